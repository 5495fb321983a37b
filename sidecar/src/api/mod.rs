//! The HTTP API: routes, and nothing but translation between JSON and the actor's commands.
//!
//! Every request passes [`gate`] first: shutdown, origin, token, body. No handler waits for anything but the actor, none keeps state, and
//! every error leaves as [`error::ApiError`].

pub mod auth;
mod body;
pub mod error;
pub mod listen;
pub mod openapi;
pub mod parse;
mod slow;
pub mod wire;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::PathRejection;
use axum::extract::{DefaultBodyLimit, FromRequestParts, MatchedPath, Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderValue, Method, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use tokio::sync::Semaphore;

use self::auth::Token;
use self::error::{ApiError, ErrorBody};
use self::listen::ConnectionState;
pub use self::listen::{ConnectionLimits, serve};
use self::parse::Entry;
use self::slow::Slices;
use self::wire::{
    BreakPinsAnswer, CompatParts, CompatPinAnswer, CompatPinBody, CompatPrefetchAnswer,
    CompatPrefetchBody, EnvelopeAnswer, EnvelopeBody, HealthAnswer, RetireAnswer, SessionBody,
    SessionsAnswer, StatusAnswer, ToolAnswer, ToolEndBody, ToolProgressBody, ToolStartBody,
};
use crate::actor::Handle;
use crate::commands::{CommandError, SessionName};
use crate::faults::delay_task;
use crate::metrics::{Metrics, Refusal, ToolEvent};

/// Bounds of what clients may ask of the API.
#[derive(Clone, Debug)]
pub struct ApiLimits {
    /// Longest body in bytes.
    pub body_bytes_max: usize,
    /// A body of this many bytes may always be taken in; of longer ones only `large_bodies_max` at once.
    pub small_body_bytes: usize,
    /// Bodies longer than `small_body_bytes` that are taken in at once.
    pub large_bodies_max: usize,
    /// Lists of all sessions that are made or taken by their clients at once.
    pub lists_max: usize,
    /// Of a body that is too long, this many bytes are read and thrown away before the answer.
    pub discard_bytes_max: usize,
    /// Time for the whole body to arrive.
    pub body_timeout: Duration,
    /// Bounds of the connections.
    pub connections: ConnectionLimits,
}

impl Default for ApiLimits {
    fn default() -> Self {
        Self {
            body_bytes_max: 4 << 20,
            small_body_bytes: 64 << 10,
            large_bodies_max: 8,
            lists_max: 8,
            discard_bytes_max: 64 << 20,
            body_timeout: Duration::from_secs(10),
            connections: ConnectionLimits::default(),
        }
    }
}

/// What every handler can reach.
struct Api {
    handle: Handle,
    auth: Option<Token>,
    limits: ApiLimits,
    large: Semaphore,
    lists: Arc<Semaphore>,
}

type Shared = State<Arc<Api>>;

/// Every call of the API: method and path. The router, the OpenAPI description and the tests are held against it.
pub const ROUTES: &[(&str, &str)] = &[
    ("get", "/healthz"),
    ("get", "/metrics"),
    ("get", "/openapi.json"),
    ("get", "/v1/status"),
    ("get", "/v1/sessions"),
    ("get", "/v1/sessions/{id}"),
    ("delete", "/v1/sessions/{id}"),
    ("post", "/v1/sessions/{id}/tool_start"),
    ("post", "/v1/sessions/{id}/tool_progress"),
    ("post", "/v1/sessions/{id}/tool_end"),
    ("delete", "/v1/pins"),
    ("post", "/v1/hints"),
    ("post", "/internal/prefetch"),
    ("post", "/internal/pin_blocks"),
];

/// The API, ready to be served.
#[derive(Clone, Debug)]
pub struct App {
    /// Routes and handlers.
    router: Router,
    /// Where connections are counted.
    metrics: Arc<Metrics>,
    /// Bounds of the connections.
    connections: ConnectionLimits,
}

/// The API over `handle`, with the usual bounds; `auth` is the token that clients must send.
pub fn router(handle: Handle, auth: Option<Token>) -> App {
    router_within(handle, auth, ApiLimits::default())
}

/// As [`router`], with bounds of the caller's choice.
pub fn router_within(handle: Handle, auth: Option<Token>, limits: ApiLimits) -> App {
    let metrics = Arc::clone(handle.metrics());
    let connections = limits.connections.clone();
    App {
        router: routes(handle, auth, limits),
        metrics,
        connections,
    }
}

fn routes(handle: Handle, auth: Option<Token>, limits: ApiLimits) -> Router {
    let api = Arc::new(Api {
        handle,
        auth,
        large: Semaphore::new(limits.large_bodies_max),
        lists: Arc::new(Semaphore::new(limits.lists_max)),
        limits,
    });
    Router::new()
        .route("/healthz", get(health))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(describe))
        .route("/v1/status", get(status))
        .route("/v1/sessions", get(sessions))
        .route("/v1/sessions/{id}", get(session).delete(retire))
        .route("/v1/sessions/{id}/tool_start", post(tool_start))
        .route("/v1/sessions/{id}/tool_progress", post(tool_progress))
        .route("/v1/sessions/{id}/tool_end", post(tool_end))
        .route("/v1/hints", post(hints))
        .route("/v1/pins", delete(break_pins))
        .route("/internal/prefetch", post(compat_prefetch))
        .route("/internal/pin_blocks", post(compat_pin))
        .method_not_allowed_fallback(|| async { ApiError::WrongMethod })
        .fallback(|| async { ApiError::UnknownRoute })
        .layer(DefaultBodyLimit::disable())
        .layer(from_fn_with_state(Arc::clone(&api), gate))
        .with_state(api)
}

/// What every request passes before its handler: may it be served at all, and is its body here in full?
async fn gate(State(api): Shared, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    let connection = request.extensions().get::<Arc<ConnectionState>>().cloned();
    let response = match admitted(&api, request).await {
        Ok(request) => {
            let _working = connection.as_ref().map(|state| state.work());
            delay_task!("gate::handler::delay");
            next.run(request).await
        }
        Err(error) => error.into_response(),
    };
    let metrics = api.handle.metrics();
    let status = response.status().as_u16();
    metrics.http(route.as_ref().map_or("unknown", |r| r.as_str()), status);
    match status {
        401 | 403 => metrics.refused(Refusal::Unauthorized),
        400 | 408 | 413 => metrics.refused(Refusal::Malformed),
        429 => metrics.refused(Refusal::Busy),
        503 => metrics.refused(Refusal::Draining),
        _ => {}
    }
    #[cfg(feature = "faults")]
    if kvstore::fault!("gate::answer::cut") {
        return crate::faults::cut_short(response).await;
    }
    response
}

async fn admitted(api: &Api, request: Request) -> Result<Request, ApiError> {
    let path = request.uri().path();
    let watched = matches!(path, "/healthz" | "/metrics");
    if api.handle.is_draining() && !watched {
        return Err(CommandError::Draining.into());
    }
    // A browser names the page behind a request that could change something; an agent never does.
    if request.headers().contains_key(header::ORIGIN) {
        return Err(ApiError::Origin);
    }
    let mut hosts = request.headers().get_all(header::HOST).iter();
    if api.auth.is_none() && hosts.any(is_domain) {
        return Err(ApiError::Host);
    }
    if let Some(token) = &api.auth
        && path != "/healthz"
        && !token.allows(request.headers())
    {
        return Err(ApiError::Unauthorized);
    }
    if *request.method() != Method::POST {
        return Ok(request);
    }
    let (parts, body) = request.into_parts();
    let bytes = body::read(body, &api.limits, &api.large).await?;
    Ok(Request::from_parts(parts, Body::from(bytes)))
}

/// Whether a `Host` is a name whose owner decides what it leads to: a web page could have it lead here, and the browser would
/// take the sidecar for the page's own server. Without a token nothing else would stop it from reading.
fn is_domain(host: &HeaderValue) -> bool {
    let Ok(host) = host.to_str() else { return true };
    let name = host.rsplit_once(':').map_or(host, |(name, _port)| name);
    let of_ip = host.starts_with('[') || name.parse::<Ipv4Addr>().is_ok();
    name.trim_end_matches('.').contains('.') && !of_ip
}

/// The session that the path names.
struct Named(SessionName);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path: Result<Path<String>, PathRejection> =
            Path::from_request_parts(parts, state).await;
        let Path(name) = path
            .map_err(|_| ApiError::Malformed("session id in the path: is not UTF-8 text".into()))?;
        parse::session_id(&name).map(Self)
    }
}

/// Whether the sidecar serves; 503 while it shuts down. Needs no token.
#[utoipa::path(get, path = "/healthz", responses((status = 200, body = HealthAnswer), (status = 503, body = ErrorBody)))]
async fn health(State(api): Shared) -> Result<Json<HealthAnswer>, ApiError> {
    if api.handle.is_draining() {
        return Err(CommandError::Draining.into());
    }
    Ok(Json(HealthAnswer {
        status: "ok",
        version: env!("CARGO_PKG_VERSION"),
        boot_id: api.handle.boot_id().to_owned(),
        engines: api.handle.engines(),
    }))
}

/// All figures in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", responses((status = 200, content_type = "text/plain", body = String)))]
async fn metrics(State(api): Shared) -> Result<Response, ApiError> {
    // Brings the gauges up to date; a sidecar that cannot answer shows those of before.
    if let Err(error) = api.handle.status().await {
        tracing::debug!(%error, "gauges not refreshed");
    }
    let text = api.handle.metrics().render();
    let text = text.map_err(|_| ApiError::Unsayable)?;
    let kind = [(
        header::CONTENT_TYPE,
        "text/plain; version=0.0.4; charset=utf-8",
    )];
    Ok((kind, text).into_response())
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, body = Object)))]
async fn describe() -> Json<utoipa::openapi::OpenApi> {
    Json(openapi::document())
}

/// Slots, engines, sessions per state, counters.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = StatusAnswer), (status = 401, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
async fn status(State(api): Shared) -> Result<Json<StatusAnswer>, ApiError> {
    let view = api.handle.status().await?;
    let counters = api.handle.metrics().counters();
    Ok(Json(StatusAnswer::new(view, counters)))
}

/// All known sessions.
#[utoipa::path(get, path = "/v1/sessions", responses((status = 200, body = SessionsAnswer), (status = 401, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
async fn sessions(State(api): Shared) -> Result<Response, ApiError> {
    let list = Arc::clone(&api.lists).try_acquire_owned();
    let list = list.map_err(|_| ApiError::LargeBodiesBusy)?;
    let views = api.handle.sessions().await?;
    let sessions = views.into_iter().map(SessionBody::from).collect();
    let json = serde_json::to_vec(&SessionsAnswer { sessions }).map_err(|_| ApiError::Unsayable)?;
    let kind = [(header::CONTENT_TYPE, "application/json")];
    Ok((kind, Body::new(Slices::new(json, list))).into_response())
}

/// One session.
#[utoipa::path(get, path = "/v1/sessions/{id}", params(("id" = String, Path, description = "Name of the session")), responses((status = 200, body = SessionBody), (status = 404, body = ErrorBody), (status = 401, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
async fn session(State(api): Shared, Named(name): Named) -> Result<Json<SessionBody>, ApiError> {
    Ok(Json(api.handle.session(name).await?.into()))
}

/// Retires a session: its blocks are freed everywhere.
#[utoipa::path(delete, path = "/v1/sessions/{id}", params(("id" = String, Path, description = "Name of the session")), responses((status = 200, body = RetireAnswer), (status = 404, body = ErrorBody), (status = 401, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
async fn retire(State(api): Shared, Named(name): Named) -> Result<Json<RetireAnswer>, ApiError> {
    let id = name.as_str().to_owned();
    let freed_blocks = api.handle.retire(name).await?;
    Ok(Json(RetireAnswer { id, freed_blocks }))
}

/// Ends all pins, whoever took them: for an operator whose arena they have filled.
#[utoipa::path(delete, path = "/v1/pins", responses((status = 200, body = BreakPinsAnswer), (status = 401, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
async fn break_pins(State(api): Shared) -> Result<Json<BreakPinsAnswer>, ApiError> {
    let broken_pins = api.handle.break_pins().await?;
    Ok(Json(BreakPinsAnswer { broken_pins }))
}

/// A tool call began. An unknown session is created.
#[utoipa::path(post, path = "/v1/sessions/{id}/tool_start", params(("id" = String, Path, description = "Name of the session")), request_body = ToolStartBody, responses((status = 200, body = ToolAnswer), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 409, body = ErrorBody), (status = 413, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
async fn tool_start(
    State(api): Shared,
    Named(name): Named,
    body: Bytes,
) -> Result<Json<ToolAnswer>, ApiError> {
    api.handle
        .tool_start(name, parse::tool_start(&body)?)
        .await?;
    api.handle.metrics().tool_event(ToolEvent::Start);
    Ok(Json(ToolAnswer { ok: true }))
}

/// News of a running tool call.
#[utoipa::path(post, path = "/v1/sessions/{id}/tool_progress", params(("id" = String, Path, description = "Name of the session")), request_body = ToolProgressBody, responses((status = 200, body = ToolAnswer), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 413, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
async fn tool_progress(
    State(api): Shared,
    Named(name): Named,
    body: Bytes,
) -> Result<Json<ToolAnswer>, ApiError> {
    api.handle
        .tool_progress(name, parse::tool_progress(&body)?)
        .await?;
    api.handle.metrics().tool_event(ToolEvent::Progress);
    Ok(Json(ToolAnswer { ok: true }))
}

/// A tool call ended: the session's KV is brought back now.
#[utoipa::path(post, path = "/v1/sessions/{id}/tool_end", params(("id" = String, Path, description = "Name of the session")), request_body = ToolEndBody, responses((status = 200, body = ToolAnswer), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 413, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
async fn tool_end(
    State(api): Shared,
    Named(name): Named,
    body: Bytes,
) -> Result<Json<ToolAnswer>, ApiError> {
    api.handle.tool_end(name, parse::tool_end(&body)?).await?;
    api.handle.metrics().tool_event(ToolEvent::End);
    Ok(Json(ToolAnswer { ok: true }))
}

/// A hint envelope; every action gets its own outcome.
#[utoipa::path(post, path = "/v1/hints", request_body = EnvelopeBody, responses((status = 200, body = EnvelopeAnswer), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 413, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
async fn hints(State(api): Shared, body: Bytes) -> Result<Json<EnvelopeAnswer>, ApiError> {
    let envelope = parse::envelope(&body)?;
    drop(body);
    let message_id = envelope.command.message_id.clone();
    let answers = if envelope.command.actions.is_empty() {
        Vec::new()
    } else {
        api.handle.hints(envelope.command).await?
    };
    for entry in &envelope.entries {
        if let Entry::Refused { verb, result } = entry {
            api.handle.metrics().hint(*verb, result.outcome);
        }
    }
    let answer = parse::envelope_answer(message_id, envelope.entries, answers);
    Ok(Json(answer))
}

/// BatchAgent's prefetch call, in its own shape.
#[utoipa::path(post, path = "/internal/prefetch", request_body = CompatPrefetchBody, responses((status = 200, body = CompatPrefetchAnswer), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 413, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
async fn compat_prefetch(
    State(api): Shared,
    body: Bytes,
) -> Result<Json<CompatPrefetchAnswer>, ApiError> {
    let items = parse::compat_prefetch(&body)?;
    let parts = CompatParts::from_results(api.handle.prefetch_compat(items).await?);
    let pairs = parts.pairs.values().map(Vec::len).sum();
    api.handle.metrics().batchagent(pairs, parts.missing.len());
    Ok(Json(CompatPrefetchAnswer {
        ok: true,
        prefetched: parts.pairs,
        missing: parts.missing,
        results: parts.results,
    }))
}

/// BatchAgent's pin call, in its own shape.
#[utoipa::path(post, path = "/internal/pin_blocks", request_body = CompatPinBody, responses((status = 200, body = CompatPinAnswer), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 413, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
async fn compat_pin(State(api): Shared, body: Bytes) -> Result<Json<CompatPinAnswer>, ApiError> {
    let items = parse::compat_pin(&body)?;
    let parts = CompatParts::from_results(api.handle.pin_compat(items).await?);
    let on_gpu = |pairs: Vec<(u32, u32)>| pairs.into_iter().map(|(_, gpu)| gpu).collect();
    let pinned = parts
        .pairs
        .into_iter()
        .map(|(key, pairs)| (key, on_gpu(pairs)));
    Ok(Json(CompatPinAnswer {
        ok: true,
        pinned: pinned.collect(),
        missing: parts.missing,
        results: parts.results,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actor;
    use crate::config::memory::Memory;
    use crate::config::{Config, Machine, Settings};
    use axum::http::StatusCode;
    use tower_service::Service;

    async fn call(router: &Router, method: Method, path: &str) -> Response {
        let request = Request::builder().method(method).uri(path);
        let request = request.body(Body::from("{}")).unwrap();
        router.clone().call(request).await.unwrap()
    }

    #[test]
    fn a_domain_is_told_from_an_address_and_a_plain_name() {
        let is_domain = |host: &str| is_domain(&HeaderValue::from_str(host).unwrap());
        for own in [
            "localhost",
            "localhost:7411",
            "127.0.0.1:7411",
            "[::1]:7411",
            "gpu-box:7411",
            "localhost.",
        ] {
            assert!(!is_domain(own), "{own}");
        }
        for name in [
            "evil.example",
            "evil.example:7411",
            "127.0.0.1.evil.example:80",
            "a.b.",
        ] {
            assert!(is_domain(name), "{name}");
        }
        assert!(super::is_domain(&HeaderValue::from_bytes(b"\xff").unwrap()));
    }

    #[tokio::test]
    async fn a_draining_sidecar_says_so_and_still_shows_its_metrics() {
        let memory = Memory {
            machine_free: 4 << 20,
            cgroup: None,
            huge_total: 0,
            huge_free: 0,
        };
        let socket = "unused".into();
        let config = Config::resolve(Settings::default(), &Machine { memory, socket }).unwrap();
        let handle = actor::start(&config, 1, Arc::new(Metrics::new()));
        let router = routes(handle.clone(), None, ApiLimits::default());
        assert_eq!(
            call(&router, Method::GET, "/healthz").await.status(),
            StatusCode::OK
        );
        handle.drain(Duration::ZERO).await;
        for path in ["/healthz", "/v1/status", "/v1/sessions/a", "/nowhere"] {
            let answer = call(&router, Method::GET, path).await;
            assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE, "{path}");
            assert_eq!(answer.headers()[header::RETRY_AFTER], "1", "{path}");
        }
        let event = call(&router, Method::POST, "/v1/sessions/a/tool_start").await;
        assert_eq!(event.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(
            call(&router, Method::GET, "/metrics").await.status(),
            StatusCode::OK
        );
    }
}
