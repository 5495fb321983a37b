//! The command line's way to a running sidecar: blocking HTTP, one call a run.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use ureq::http::Response;
use ureq::{Agent, Body};

use super::CliError;
use crate::api::auth::read_token;

/// Longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Longest answer that is read, in bytes.
const ANSWER_MAX: u64 = 256 << 20;

/// Where the sidecar is.
#[derive(Debug, clap::Args)]
pub(super) struct Server {
    /// Address of the sidecar's HTTP API
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:7411", value_parser = http_url)]
    pub url: String,
    /// File with the sidecar's token, if it wants one
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

fn http_url(text: &str) -> Result<String, String> {
    if text.starts_with("http://") || text.starts_with("https://") {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "an address begins with http://, as in http://{text}"
        ))
    }
}

/// A call to make.
pub(super) enum Call<'a> {
    /// Read something.
    Get,
    /// Tell something.
    Post(&'a Value),
}

impl Server {
    /// Makes one call and returns the JSON of the answer.
    ///
    /// # Errors
    /// [`CliError::NoAnswer`], [`CliError::Refused`], [`CliError::Strange`]; [`CliError::Config`] for the token file.
    pub(super) fn call(&self, path: &str, call: Call<'_>) -> Result<Value, CliError> {
        let url = format!("{}{path}", self.url.trim_end_matches('/'));
        let config = Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .proxy(None)
            .build();
        let agent = Agent::new_with_config(config);
        let bearer = match &self.token_file {
            Some(path) => Some(format!("Bearer {}", read_token(path)?)),
            None => None,
        };
        let answer = match call {
            Call::Get => {
                let request = agent.get(&url);
                match &bearer {
                    Some(bearer) => request.header("authorization", bearer).call(),
                    None => request.call(),
                }
            }
            Call::Post(body) => {
                let request = agent.post(&url);
                match &bearer {
                    Some(bearer) => request.header("authorization", bearer).send_json(body),
                    None => request.send_json(body),
                }
            }
        };
        let answer = answer.map_err(|error| CliError::NoAnswer {
            url: self.url.clone(),
            reason: error.to_string(),
        })?;
        self.understand(answer)
    }

    fn understand(&self, mut answer: Response<Body>) -> Result<Value, CliError> {
        let status = answer.status();
        let strange = |reason: String| CliError::Strange {
            url: self.url.clone(),
            reason,
        };
        let body = answer
            .body_mut()
            .with_config()
            .limit(ANSWER_MAX)
            .read_to_string();
        let text = body.map_err(|error| strange(error.to_string()))?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|_| strange(format!("status {status}, no JSON")))?;
        if status.is_success() {
            return Ok(value);
        }
        match (
            value["error"]["code"].as_str(),
            value["error"]["message"].as_str(),
        ) {
            (Some(code), Some(message)) => Err(CliError::Refused {
                code: code.to_owned(),
                message: message.to_owned(),
            }),
            _ => Err(strange(format!("status {status}"))),
        }
    }
}

/// A session's name as one segment of a path.
pub(super) fn segment(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_segment_whatever_it_holds() {
        assert_eq!(segment("a-1_b.c~"), "a-1_b.c~");
        assert_eq!(segment("a/b ?ü%"), "a%2Fb%20%3F%C3%BC%25");
    }
}
