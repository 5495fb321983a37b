//! Ties the daemon together: the arena, the engine socket, the actor and the HTTP API, from start to drained end.

use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvstore::{ArenaError, ArenaFile};
use rustix::fs::{
    AtFlags, FlockOperation, Mode, OFlags, chmodat, fchmod, flock, linkat, open, unlinkat,
};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use tokio::net::{TcpListener, UnixListener};

use crate::actor;
use crate::api;
use crate::config::{Config, ConfigError, SOCKET_PATH_MAX, prepare_socket_folder, socket_folder};
use crate::engine;
use crate::metrics::Metrics;

/// Of the engine socket: this user reads and writes, nobody else.
const SOCKET_MODE: Mode = Mode::RUSR.union(Mode::WUSR);
/// Engine connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Why the sidecar could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The arena could not be made.
    #[error("no arena: {0}")]
    Arena(#[from] ArenaError),
    /// Another sidecar answers on the socket.
    #[error("a sidecar already serves {}: stop it, or give this one another --socket", .0.display())]
    SocketInUse(PathBuf),
    /// Something that is no socket has the socket's name.
    #[error("{} exists and is no socket: move it away, or give another --socket", .0.display())]
    NotASocket(PathBuf),
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
    let socket = bind_engine_socket(&config.socket)?;
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

/// Binds the engine socket, private to this user; takes the place of one that nobody serves any more, and of nothing else.
fn bind_engine_socket(path: &Path) -> Result<UnixListener, ServeError> {
    prepare_socket_folder(path)?;
    let failed = |source: io::Error| ServeError::Socket {
        what: format!("cannot serve engines on {}", path.display()),
        source,
    };
    if path.as_os_str().len() > SOCKET_PATH_MAX {
        let reason = format!("its path is longer than {SOCKET_PATH_MAX} bytes");
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, reason)));
    }
    let name = path
        .file_name()
        .ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = open(socket_folder(path), flags, Mode::empty()).map_err(|e| failed(e.into()))?;
    if path.symlink_metadata().is_ok() {
        remove_dead(path, &folder, &failed)?;
    }
    // The name appears when somebody listens behind it, so that a socket that refuses a connection is a dead one.
    let unfinished = format!(".greenroom-{}", engine::start_id());
    let socket = listen_on(&folder, &unfinished).map_err(|e| failed(e.into()));
    let named = socket
        .as_ref()
        .ok()
        .map(|_| linkat(&folder, &unfinished, &folder, name, AtFlags::empty()));
    match unlinkat(&folder, &unfinished, AtFlags::empty()) {
        Err(error) if socket.is_ok() => return Err(failed(error.into())),
        _ => {}
    }
    let socket = socket?;
    match named {
        // Somebody was faster.
        Some(Err(rustix::io::Errno::EXIST)) => Err(ServeError::SocketInUse(path.to_owned())),
        Some(Err(error)) => Err(failed(error.into())),
        _ => UnixListener::from_std(socket.into()).map_err(failed),
    }
}

/// A socket under a name in the folder, however long the folder's path is; nobody but this user can ever connect to it.
fn listen_on(folder: &OwnedFd, name: &str) -> rustix::io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}/{name}", folder.as_raw_fd());
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Before it has a name: Linux gives the file the socket's own mode, less the umask. If the mode were changed afterwards,
    // others could connect in between; if the umask were, other threads' files would change too.
    fchmod(&socket, SOCKET_MODE)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    // The umask may have taken away what this user needs.
    chmodat(folder, name, SOCKET_MODE, AtFlags::empty())?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Removes the socket of a sidecar that is gone. Anything else in the way stays, and is an error.
fn remove_dead(
    path: &Path,
    folder: &OwnedFd,
    failed: &dyn Fn(io::Error) -> ServeError,
) -> Result<(), ServeError> {
    // Of two that find the same dead socket, the second must not remove the new one of the first.
    match flock(folder, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => {
            return Err(ServeError::SocketInUse(path.to_owned()));
        }
        locked => locked.map_err(|e| failed(e.into()))?,
    }
    // Not through a link: what it leads to is neither ours to serve on nor to remove.
    let found = match path.symlink_metadata() {
        Err(gone) if gone.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(failed)?,
    };
    if !found.file_type().is_socket() {
        return Err(ServeError::NotASocket(path.to_owned()));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(ServeError::SocketInUse(path.to_owned())),
        Err(refused) if refused.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        Err(other) => Err(failed(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn refused(path: &Path) -> String {
        bind_engine_socket(path)
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default()
    }

    /// Modes of everything that is ever seen in the folder while sockets are bound there.
    #[tokio::test]
    async fn the_socket_is_private_from_its_first_moment() {
        let folder = tempfile::tempdir().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (watched, end) = (folder.path().to_owned(), stop.clone());
        let watcher = std::thread::spawn(move || {
            let (mut seen, mut modes) = (0, 0);
            while !end.load(Ordering::Relaxed) {
                for entry in std::fs::read_dir(&watched).unwrap() {
                    if let Ok(meta) = entry.and_then(|e| e.path().symlink_metadata()) {
                        seen += 1;
                        modes |= meta.mode() & 0o777;
                    }
                }
            }
            (seen, modes)
        });
        for _ in 0..2000 {
            drop(bind_engine_socket(&folder.path().join("s")).unwrap());
        }
        stop.store(true, Ordering::Relaxed);
        let (seen, modes) = watcher.join().unwrap();
        assert_eq!(modes, 0o600, "{modes:o}, seen {seen} times");
        let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[tokio::test]
    async fn a_long_path_that_the_system_can_connect_to_can_be_served() {
        let folder = tempfile::tempdir().unwrap();
        let length = 107 - folder.path().as_os_str().len() - 1;
        let path = folder.path().join("x".repeat(length));
        let listener = bind_engine_socket(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(listener);
        let longer = folder.path().join("x".repeat(length + 1));
        assert!(refused(&longer).contains("107"), "{}", refused(&longer));
    }

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        drop(bind_engine_socket(&path).unwrap());
        let live = bind_engine_socket(&path).unwrap();
        assert!(refused(&path).contains("already serves"));
        UnixStream::connect(&path).unwrap();
        drop(live);
    }

    #[tokio::test]
    async fn nothing_that_is_no_socket_is_removed_or_followed() {
        let folder = tempfile::tempdir().unwrap();
        let precious = folder.path().join("precious");
        std::fs::write(&precious, "years of work").unwrap();
        assert!(refused(&precious).contains("is no socket"));
        let elsewhere = folder.path().join("elsewhere");
        let live = bind_engine_socket(&elsewhere).unwrap();
        for (name, target) in [
            ("to-a-file", &precious),
            ("to-a-socket", &elsewhere),
            ("to-nothing", &folder.path().join("nothing")),
        ] {
            let link = folder.path().join(name);
            symlink(target, &link).unwrap();
            assert!(refused(&link).contains("is no socket"), "{name}");
            assert!(
                std::fs::symlink_metadata(&link).unwrap().is_symlink(),
                "{name}"
            );
        }
        assert_eq!(std::fs::read_to_string(&precious).unwrap(), "years of work");
        assert!(!folder.path().join("nothing").exists());
        drop(live);
    }

    #[tokio::test]
    async fn of_two_that_find_a_dead_socket_one_serves_and_the_other_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let runtime = tokio::runtime::Handle::current();
        for _ in 0..200 {
            drop(bind_engine_socket(&path).unwrap());
            let listeners: Vec<_> = std::thread::scope(|scope| {
                let starts = [(), ()].map(|()| {
                    scope.spawn(|| {
                        let _inside = runtime.enter();
                        bind_engine_socket(&path)
                    })
                });
                starts
                    .map(|start| start.join().unwrap())
                    .into_iter()
                    .filter_map(Result::ok)
                    .collect()
            });
            assert!(listeners.len() <= 1, "both think that they serve");
            if listeners.len() == 1 {
                UnixStream::connect(&path).unwrap();
            }
        }
    }
}
