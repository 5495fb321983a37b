//! The places that `greenroom serve` needs: the engines' socket, its folder, the HTTP port, the token file.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::Finding;
use crate::api::auth::{check_writers, read_token};
use crate::config::{LISTEN_DEFAULT, Listen, SOCKET_PATH_MAX, Settings, default_socket};

/// All of them.
pub(super) fn check(settings: &Settings) -> Vec<Finding> {
    let path = settings.socket.clone().unwrap_or_else(default_socket);
    let mut findings = vec![folder(&path), socket(&path)];
    if let Listen::On(address) = settings.listen.unwrap_or(Listen::On(LISTEN_DEFAULT)) {
        findings.push(port(address));
    }
    if let Some(path) = &settings.token_file {
        findings.push(token(path));
    }
    findings
}

fn folder(socket: &Path) -> Finding {
    let area = "runtime folder";
    let folder = socket.parent().unwrap_or(Path::new("."));
    let shown = folder.display();
    let own = rustix::process::geteuid().as_raw();
    match fs::metadata(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            match folder.parent().map(fs::metadata) {
                Some(Ok(_)) => {
                    Finding::ok(area, format!("{shown} will be made, for this user only"))
                }
                _ => Finding::problem(
                    area,
                    format!("neither {shown} nor the folder above it exists"),
                )
                .do_this("make it, or give another --socket"),
            }
        }
        Err(error) => {
            Finding::problem(area, format!("{shown}: {error}")).do_this("give another --socket")
        }
        Ok(meta) if meta.uid() != own && meta.uid() != 0 => {
            Finding::problem(area, format!("{shown} belongs to another user"))
                .do_this("give another --socket")
        }
        Ok(meta) if meta.mode() & 0o022 != 0 && meta.mode() & 0o1000 == 0 => {
            Finding::problem(area, format!("other users can write to {shown}"))
                .do_this(format!("chmod go-w {shown}"))
        }
        Ok(_) if rustix::fs::access(folder, rustix::fs::Access::WRITE_OK).is_err() => {
            Finding::problem(area, format!("{shown} cannot be written to"))
                .do_this("give another --socket")
        }
        Ok(_) => Finding::ok(area, shown.to_string()),
    }
}

fn socket(path: &Path) -> Finding {
    let area = "socket";
    let shown = path.display();
    if path.as_os_str().len() > SOCKET_PATH_MAX {
        return Finding::problem(
            area,
            format!("{shown} is longer than {SOCKET_PATH_MAX} bytes"),
        )
        .do_this("give a shorter --socket");
    }
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Finding::ok(area, format!("{shown} is free"))
        }
        Err(error) => {
            Finding::problem(area, format!("{shown}: {error}")).do_this("give another --socket")
        }
        Ok(meta) if !meta.file_type().is_socket() => {
            Finding::problem(area, format!("{shown} exists and is no socket"))
                .do_this("move it away, or give another --socket")
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => Finding::note(area, format!("a sidecar already serves {shown}"))
                .do_this("engines can use it; a second one needs another --socket"),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Finding::ok(
                area,
                format!("{shown} was left behind by a sidecar that is gone; serve takes its place"),
            ),
            Err(error) => {
                Finding::problem(area, format!("{shown}: {error}")).do_this("give another --socket")
            }
        },
    }
}

fn port(address: SocketAddr) -> Finding {
    let area = "http";
    match TcpListener::bind(address) {
        Ok(_) => Finding::ok(area, format!("{address} is free")),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            Finding::warning(area, format!("{address} is in use, perhaps by a sidecar"))
                .do_this("`greenroom status` asks it; a second sidecar needs another --listen")
        }
        Err(error) => {
            Finding::problem(area, format!("{address}: {error}")).do_this("give another --listen")
        }
    }
}

fn token(path: &Path) -> Finding {
    let area = "token";
    if let Err(error) = read_token(path) {
        return Finding::problem(area, error.to_string())
            .do_this("write a token into it, e.g. openssl rand -hex 32");
    }
    if let Err(error) = check_writers(path) {
        return Finding::problem(area, error.to_string())
            .do_this("keep it to the user that runs the sidecar");
    }
    match fs::metadata(path) {
        Ok(meta) if meta.mode() & 0o004 != 0 => {
            Finding::warning(area, format!("everybody can read {}", path.display()))
                .do_this(format!("chmod o-r {}", path.display()))
        }
        _ => Finding::ok(area, path.display().to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_socket_in_use_a_stale_one_and_a_plain_file_are_told_apart() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("s");
        assert!(socket(&path).found.contains("is free"));
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(socket(&path).severity, Severity::Note);
        drop(listener);
        assert!(socket(&path).found.contains("left behind"));
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        assert_eq!(socket(&path).severity, Severity::Problem);
        let long = base.path().join("x".repeat(120));
        assert!(socket(&long).found.contains("107"));
    }

    #[test]
    fn a_folder_is_made_or_must_be_safe() {
        let base = tempfile::tempdir().unwrap();
        let inner = base.path().join("inner");
        let path = inner.join("s");
        assert_eq!(folder(&path).severity, Severity::Ok);
        assert_eq!(folder(&inner.join("deeper/s")).severity, Severity::Problem);
        fs::create_dir(&inner).unwrap();
        assert_eq!(folder(&path).severity, Severity::Ok);
        fs::set_permissions(&inner, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(folder(&path).found.contains("other users"));
    }

    #[test]
    fn a_port_in_use_is_a_warning() {
        let holder = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = holder.local_addr().unwrap();
        assert_eq!(port(address).severity, Severity::Warning);
        drop(holder);
        assert_eq!(port(address).severity, Severity::Ok);
    }

    #[test]
    fn a_token_file_must_hold_a_token_that_not_everybody_reads() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("t");
        assert_eq!(token(&path).severity, Severity::Problem);
        fs::write(&path, "open-sesame").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(token(&path).severity, Severity::Warning);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o606)).unwrap();
        assert_eq!(token(&path).severity, Severity::Problem);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(token(&path).severity, Severity::Ok);
    }
}
