//! What a client is told when something is wrong: one enum, one JSON shape, one table of codes and statuses.
//!
//! Every error of the API, those of the router and of the JSON parser included, leaves through [`ApiError`].

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::commands::CommandError;

/// Seconds after which a client that was told "busy" may try again.
const RETRY_AFTER_S: HeaderValue = HeaderValue::from_static("1");

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// The body or the path is not what the call takes; the text names the field.
    #[error("{0}")]
    Malformed(String),
    /// The envelope is of another protocol version.
    #[error("protocol_version: `{0}` is not supported; 1.0 is")]
    Version(String),
    /// A list is too long; nothing of the request was done.
    #[error(
        "{field} has {sent} entries, the limit is {limit}; nothing was done, send fewer at a time"
    )]
    TooMany {
        /// The list.
        field: &'static str,
        /// Its length.
        sent: usize,
        /// Its limit.
        limit: usize,
    },
    /// The body is too long.
    #[error("the body is longer than {limit} bytes; nothing was done")]
    TooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// The body did not arrive in time.
    #[error("the body did not arrive in time; nothing was done")]
    SlowBody,
    /// The body broke off.
    #[error("the body broke off; nothing was done")]
    BrokenBody,
    /// No token, or a wrong one.
    #[error("a valid `Authorization: Bearer` token is required")]
    Unauthorized,
    /// The request comes from a web page, which has no business here.
    #[error("requests from web pages are not served")]
    Origin,
    /// The sidecar has no token and was called by a name that a web page's owner could have made lead here.
    #[error(
        "a sidecar without a token answers to its address and to localhost only: call it so, or give it a --token-file"
    )]
    Host,
    /// No such path.
    #[error("no such call; GET /openapi.json lists them")]
    UnknownRoute,
    /// The path exists, but not with this method.
    #[error("the call exists, but not with this method; GET /openapi.json lists them")]
    WrongMethod,
    /// Too many large bodies at once.
    #[error("too many large requests at once; try again in a moment")]
    LargeBodiesBusy,
    /// The answer could not be written down.
    #[error("the answer could not be written down")]
    Unsayable,
    /// The actor could not do it.
    #[error(transparent)]
    Command(#[from] CommandError),
}

impl ApiError {
    /// The `code` of the answer and its HTTP status.
    pub fn code(&self) -> (&'static str, StatusCode) {
        match self {
            Self::Malformed(_) => ("malformed", StatusCode::BAD_REQUEST),
            Self::Version(_) => ("unsupported_version", StatusCode::BAD_REQUEST),
            Self::TooMany { .. } => ("too_many_entries", StatusCode::PAYLOAD_TOO_LARGE),
            Self::TooLarge { .. } => ("too_large", StatusCode::PAYLOAD_TOO_LARGE),
            Self::SlowBody => ("timeout", StatusCode::REQUEST_TIMEOUT),
            Self::BrokenBody => ("malformed", StatusCode::BAD_REQUEST),
            Self::Unauthorized => ("unauthorized", StatusCode::UNAUTHORIZED),
            Self::Origin | Self::Host => ("forbidden", StatusCode::FORBIDDEN),
            Self::UnknownRoute => ("unknown_route", StatusCode::NOT_FOUND),
            Self::WrongMethod => ("wrong_method", StatusCode::METHOD_NOT_ALLOWED),
            Self::LargeBodiesBusy => ("busy", StatusCode::TOO_MANY_REQUESTS),
            Self::Unsayable => ("internal", StatusCode::INTERNAL_SERVER_ERROR),
            Self::Command(error) => command_code(*error),
        }
    }
}

fn command_code(error: CommandError) -> (&'static str, StatusCode) {
    match error {
        CommandError::Busy => ("busy", StatusCode::TOO_MANY_REQUESTS),
        CommandError::Draining => ("draining", StatusCode::SERVICE_UNAVAILABLE),
        CommandError::UnknownSession => ("unknown_session", StatusCode::NOT_FOUND),
        CommandError::TooManySessions => ("too_many_sessions", StatusCode::TOO_MANY_REQUESTS),
        CommandError::UnknownCall => ("unknown_call", StatusCode::CONFLICT),
        CommandError::TooManyCalls => ("too_many_calls", StatusCode::CONFLICT),
    }
}

/// The body of every error.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// For programs: `malformed`, `busy`, `unknown_session`, …
    pub code: String,
    /// For people; names the field where there is one.
    pub message: String,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (code, status) = self.code();
        let body = ErrorBody {
            error: ErrorDetail {
                code: code.to_owned(),
                message: self.to_string(),
            },
        };
        let mut response = (status, Json(body)).into_response();
        let headers = response.headers_mut();
        match status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, RETRY_AFTER_S);
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            // What is left of the body must not be taken for the next request.
            StatusCode::REQUEST_TIMEOUT => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_and_draining_say_when_to_come_back() {
        for error in [CommandError::Busy, CommandError::Draining] {
            let response = ApiError::from(error).into_response();
            assert_eq!(response.headers()[header::RETRY_AFTER], "1", "{error}");
        }
        let plain = ApiError::UnknownRoute.into_response();
        assert!(!plain.headers().contains_key(header::RETRY_AFTER));
    }

    #[test]
    fn every_command_error_has_its_own_code() {
        let all = [
            (CommandError::Busy, 429),
            (CommandError::Draining, 503),
            (CommandError::UnknownSession, 404),
            (CommandError::TooManySessions, 429),
            (CommandError::UnknownCall, 409),
            (CommandError::TooManyCalls, 409),
        ];
        let mut codes: Vec<&str> = Vec::new();
        for (error, status) in all {
            let (code, got) = ApiError::from(error).code();
            assert_eq!(got.as_u16(), status, "{code}");
            assert!(!codes.contains(&code), "{code} twice");
            codes.push(code);
        }
    }
}
