//! Ties the daemon together: the arena, the engine socket, the actor and the HTTP API, from start to drained end.

use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvstore::{ArenaError, ArenaFile};
use tokio::net::{TcpListener, UnixListener};

use crate::actor;
use crate::api;
use crate::config::{Config, ConfigError, prepare_socket_folder};
use crate::engine;
use crate::metrics::Metrics;

/// Why the sidecar could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The arena could not be made.
    #[error("no arena: {0}")]
    Arena(#[from] ArenaError),
    /// Another sidecar answers on the socket.
    #[error("a sidecar already serves {}: stop it, or give this one another --socket", .0.display())]
    SocketInUse(PathBuf),
    /// The socket's folder or the token file is not usable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A socket could not be bound or accepted on.
    #[error("{what}: {source}")]
    Socket {
        /// Which one.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
}

/// Serves until `shutdown` is done, then drains: clients get 503, and leases may end for `drain_timeout`.
///
/// # Errors
/// [`ServeError`]; nothing is left behind.
pub async fn run(
    config: Config,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let arena = Arc::new(ArenaFile::create(config.memory, config.page_size)?);
    let metrics = Arc::new(Metrics::new());
    let auth = api::auth::Token::load(config.token_file.as_deref())?;
    let http = match config.listen {
        Some(address) => {
            let what = || format!("cannot listen on {address}");
            Some(
                TcpListener::bind(address)
                    .await
                    .map_err(|source| ServeError::Socket {
                        what: what(),
                        source,
                    })?,
            )
        }
        None => None,
    };
    // Last of what may fail: its file would stay behind.
    let socket = bind_engine_socket(&config.socket).await?;
    let actor = actor::start(&config, engine::start_id(), metrics);
    let address = http
        .as_ref()
        .and_then(|listener| listener.local_addr().ok());
    tracing::info!(
        boot = actor.boot_id(),
        memory = config.memory,
        socket = %config.socket.display(),
        listen = address.map(|a| a.to_string()),
        "serving"
    );
    let engines = tokio::spawn(engine::server::accept(socket, arena, actor.clone()));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let api = http.map(|listener| {
        let ended = async move { stopped.await.unwrap_or_default() };
        tokio::spawn(api::serve(
            listener,
            api::router(actor.clone(), auth),
            ended,
        ))
    });
    shutdown.await;
    tracing::info!("shutting down");
    actor.drain(config.drain_timeout).await;
    drop(stop);
    if let Some(api) = api
        && let Ok(Err(error)) = api.await
    {
        tracing::error!(%error, "the HTTP API ended early");
    }
    engines.abort();
    if let Err(error) = std::fs::remove_file(&config.socket) {
        tracing::warn!(%error, "the socket file stays behind");
    }
    Ok(())
}

/// Binds the engine socket, private to this user; takes the place of one that nobody serves any more.
async fn bind_engine_socket(path: &Path) -> Result<UnixListener, ServeError> {
    prepare_socket_folder(path)?;
    let error = |source| ServeError::Socket {
        what: format!("cannot serve engines on {}", path.display()),
        source,
    };
    if path.exists() {
        if tokio::net::UnixStream::connect(path).await.is_ok() {
            return Err(ServeError::SocketInUse(path.to_owned()));
        }
        std::fs::remove_file(path).map_err(error)?;
    }
    let listener = UnixListener::bind(path).map_err(error)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(error)?;
    Ok(listener)
}
