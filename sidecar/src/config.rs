//! Configuration of `greenroom serve`: a TOML file, then flags, then defaults; what is wrong is refused with a sentence, never repaired.
//!
//! [`Settings`] is what a person may write (every field optional), [`Config`] is what the sidecar runs with (every field decided).
//! Nothing is read from the environment but the place of the runtime folder. Never touches the arena's memory.

pub mod memory;
mod values;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvstore::PageSize;
use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

use self::memory::{HUGE_PAGE_BYTES, Memory};
pub use self::values::{Listen, LogFormat, Pages, Size, Span, ValueError};

/// Where the API listens unless told otherwise.
pub const LISTEN_DEFAULT: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 7411);

/// The arena is at most this large unless a size is given.
pub const MEMORY_DEFAULT_MAX: u64 = 32 << 30;

/// The smallest arena that makes sense, in bytes.
pub const MEMORY_MIN: u64 = 1 << 20;

/// Longest lease; an engine that is alive renews far more often.
pub const LEASE_TTL_MAX: Duration = Duration::from_secs(3600);

/// Longest time that shutdown may wait for engines and clients.
pub const DRAIN_TIMEOUT_MAX: Duration = Duration::from_secs(600);

/// Most sessions that can be configured; each costs a few hundred bytes and its list of block hashes.
pub const SESSIONS_MAX: usize = 1_000_000;

/// Longest path of a Unix socket on Linux, in bytes.
pub const SOCKET_PATH_MAX: usize = 107;

/// File name of the engines' socket.
const SOCKET_NAME: &str = "greenroom.sock";

/// What the config file and the flags may say; a flag wins over the file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Size of the arena, e.g. 8GiB [default: half of what the control group and the machine leave free, at most 32GiB]
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Size>,
    /// Pages of the arena; huge ones must have been reserved [default: 4KiB]
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page_size: Option<Pages>,
    /// Unix socket for engines [default: greenroom.sock in $XDG_RUNTIME_DIR, else /run/user/UID, else a private temporary folder]
    #[arg(long, value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Address of the HTTP API, or `none` [default: 127.0.0.1:7411]
    #[arg(long, value_name = "ADDRESS:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<Listen>,
    /// File with the token that clients must send as `Authorization: Bearer …`; required unless the address is a loopback one
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// Share of the slots that pins may take, 0 to 1 [default: 0.5]
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pin_budget: Option<f64>,
    /// How long an engine may use what it has leased [default: 30s]
    #[arg(long, value_name = "DURATION")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease_ttl: Option<Span>,
    /// Sessions remembered at once [default: 10000]
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sessions_max: Option<usize>,
    /// Longest wait for copies and requests to end on shutdown [default: 10s]
    #[arg(long, value_name = "DURATION")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drain_timeout: Option<Span>,
    /// What is logged: error, warn, info, debug, trace, or filter directives [default: info]
    #[arg(long, value_name = "FILTER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<String>,
    /// How log lines look [default: text]
    #[arg(long, value_name = "FORMAT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_format: Option<LogFormat>,
}

impl Settings {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// [`ConfigError::Unreadable`], or [`ConfigError::File`] with the place and the name of an unknown key.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
        toml::from_str(&text).map_err(|source| ConfigError::File {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

    /// These settings, with `other` filling what they leave open.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            memory: self.memory.or(other.memory),
            page_size: self.page_size.or(other.page_size),
            socket: self.socket.or(other.socket),
            listen: self.listen.or(other.listen),
            token_file: self.token_file.or(other.token_file),
            pin_budget: self.pin_budget.or(other.pin_budget),
            lease_ttl: self.lease_ttl.or(other.lease_ttl),
            sessions_max: self.sessions_max.or(other.sessions_max),
            drain_timeout: self.drain_timeout.or(other.drain_timeout),
            log: self.log.or(other.log),
            log_format: self.log_format.or(other.log_format),
        }
    }
}

/// What the sidecar runs with.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Bytes of the arena, a whole number of pages.
    pub memory: u64,
    /// Pages of the arena.
    pub page_size: PageSize,
    /// Unix socket for engines.
    pub socket: PathBuf,
    /// Address of the HTTP API; none for engines only.
    pub listen: Option<SocketAddr>,
    /// File with the clients' token.
    pub token_file: Option<PathBuf>,
    /// Share of the slots that pins may take, 0 to 1.
    pub pin_budget: f64,
    /// How long an engine may use what it has leased.
    pub lease_ttl: Duration,
    /// Sessions remembered at once.
    pub sessions_max: usize,
    /// Longest wait for copies and requests to end on shutdown.
    pub drain_timeout: Duration,
    /// Filter directives of the log.
    pub log: String,
    /// How log lines look.
    pub log_format: LogFormat,
}

/// What is logged. Values of fields in it are taken literally: as patterns, which they would be, a line of dots takes minutes
/// to be read. None if it is neither a level nor filter directives, or not ASCII: the parser panics at some other spaces.
pub fn log_filter(directives: &str) -> Option<EnvFilter> {
    if !directives.is_ascii() {
        return None;
    }
    let filter = EnvFilter::builder().with_regex(false);
    filter.parse(directives).ok()
}

impl Config {
    /// Decides every field: what the settings leave open gets its default.
    ///
    /// # Errors
    /// Any variant of [`ConfigError`] that concerns a value.
    pub fn resolve(settings: Settings, machine: &Machine) -> Result<Self, ConfigError> {
        let listen = match settings.listen.unwrap_or(Listen::On(LISTEN_DEFAULT)) {
            Listen::None => None,
            Listen::On(address) => Some(address),
        };
        if let Some(address) = listen
            && !address.ip().is_loopback()
            && settings.token_file.is_none()
        {
            return Err(ConfigError::TokenNeeded { address });
        }
        let pages = settings.page_size.unwrap_or(Pages::Base);
        let pin_budget = settings.pin_budget.unwrap_or(0.5);
        if !(0.0..=1.0).contains(&pin_budget) {
            return Err(ConfigError::value("pin_budget", "must lie between 0 and 1"));
        }
        let lease_ttl = settings.lease_ttl.map_or(Duration::from_secs(30), |s| s.0);
        if lease_ttl < Duration::from_secs(1) || lease_ttl > LEASE_TTL_MAX {
            return Err(ConfigError::value(
                "lease_ttl",
                "must lie between 1s and 1h",
            ));
        }
        let drain_timeout = settings
            .drain_timeout
            .map_or(Duration::from_secs(10), |s| s.0);
        if drain_timeout > DRAIN_TIMEOUT_MAX {
            return Err(ConfigError::value("drain_timeout", "must be at most 10m"));
        }
        let sessions_max = settings.sessions_max.unwrap_or(10_000);
        if sessions_max == 0 || sessions_max > SESSIONS_MAX {
            return Err(ConfigError::value(
                "sessions_max",
                "must lie between 1 and 1000000",
            ));
        }
        let log = settings.log.unwrap_or_else(|| "info".to_owned());
        if log_filter(&log).is_none() {
            return Err(ConfigError::value(
                "log",
                "must be a level (info) or filter directives (warn,sidecar=debug)",
            ));
        }
        Ok(Self {
            memory: arena_bytes(settings.memory, pages, &machine.memory)?,
            page_size: match pages {
                Pages::Base => PageSize::Base4K,
                Pages::Huge => PageSize::Huge2M,
            },
            socket: settings.socket.unwrap_or_else(|| machine.socket.clone()),
            listen,
            token_file: settings.token_file,
            pin_budget,
            lease_ttl,
            sessions_max,
            drain_timeout,
            log,
            log_format: settings.log_format.unwrap_or(LogFormat::Text),
        })
    }
}

/// What the defaults depend on.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Memory that can be had.
    pub memory: Memory,
    /// Where the engines' socket goes unless told otherwise.
    pub socket: PathBuf,
}

impl Machine {
    /// Looks at this machine.
    ///
    /// # Errors
    /// [`ConfigError::Unreadable`] if the memory figures cannot be read.
    pub fn probe() -> Result<Self, ConfigError> {
        let memory = Memory::probe().map_err(|source| ConfigError::Unreadable {
            path: "/proc/meminfo".into(),
            source,
        })?;
        Ok(Self {
            memory,
            socket: default_socket(),
        })
    }
}

/// Where engines look for the sidecar unless told otherwise: the same rule on both sides.
pub fn default_socket() -> PathBuf {
    let uid = rustix::process::getuid().as_raw();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    socket_in(runtime, uid, Path::new("/run/user"))
}

fn socket_in(runtime: Option<PathBuf>, uid: u32, run_user: &Path) -> PathBuf {
    let of_user = run_user.join(uid.to_string());
    let folder = match runtime.filter(|p| p.is_absolute()) {
        Some(folder) => folder,
        None if of_user.is_dir() => of_user,
        None => std::env::temp_dir().join(format!("greenroom-{uid}")),
    };
    folder.join(SOCKET_NAME)
}

/// The folder that a socket's path names.
pub fn socket_folder(socket: &Path) -> &Path {
    match socket.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes the socket's folder if it is missing (mode 0700), and refuses one that others could use to put a socket of theirs in its place.
///
/// # Errors
/// [`ConfigError::SocketFolder`].
pub fn prepare_socket_folder(socket: &Path) -> Result<(), ConfigError> {
    let folder = socket_folder(socket);
    let failed = |reason: String| ConfigError::SocketFolder {
        folder: folder.to_owned(),
        reason,
    };
    let made = fs::DirBuilder::new().mode(0o700).create(folder);
    match made {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed(error.to_string())),
    }
    let meta = fs::metadata(folder).map_err(|error| failed(error.to_string()))?;
    let uid = rustix::process::getuid().as_raw();
    let (sticky, open) = (meta.mode() & 0o1000 != 0, meta.mode() & 0o022 != 0);
    if !meta.is_dir() {
        return Err(failed("it is not a folder".to_owned()));
    }
    if meta.uid() != uid && meta.uid() != 0 {
        return Err(failed("it belongs to another user".to_owned()));
    }
    if open && !sticky {
        return Err(failed(
            "other users can write to it; chmod go-w it".to_owned(),
        ));
    }
    Ok(())
}

/// Decides the arena's size. A given size is an upper bound: it is rounded down to whole pages.
fn arena_bytes(asked: Option<Size>, pages: Pages, memory: &Memory) -> Result<u64, ConfigError> {
    let (page, free) = match pages {
        Pages::Base => (4096, memory.free()),
        Pages::Huge => (HUGE_PAGE_BYTES, memory.huge_free),
    };
    let wanted = match asked {
        Some(size) => size.0,
        None => (free / 2).min(MEMORY_DEFAULT_MAX),
    };
    let bytes = wanted - wanted % page;
    if bytes > free || (asked.is_none() && bytes < MEMORY_MIN) {
        let (asked, free) = (Size(bytes.max(MEMORY_MIN)), Size(free));
        return Err(match pages {
            Pages::Huge => ConfigError::NoHugePages {
                asked,
                free,
                pages: bytes.max(MEMORY_MIN).div_ceil(HUGE_PAGE_BYTES),
            },
            Pages::Base => ConfigError::NoMemory {
                asked,
                free,
                by: memory.limited_by(),
            },
        });
    }
    if bytes < MEMORY_MIN {
        return Err(ConfigError::value(
            "memory",
            "must be at least 1MiB, or one huge page",
        ));
    }
    Ok(bytes)
}

/// Why the sidecar cannot start with this configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The config file is wrong.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Where and what, with the key's name.
        source: Box<toml::de::Error>,
    },
    /// A value is out of its range.
    #[error("{key} {reason}")]
    Value {
        /// The key as it is written in the file.
        key: &'static str,
        /// The rule that it breaks.
        reason: &'static str,
    },
    /// The arena would not fit.
    #[error("an arena of {asked} does not fit: {by} leaves {free} free; give a smaller --memory")]
    NoMemory {
        /// The arena's size.
        asked: Size,
        /// What is free.
        free: Size,
        /// Who sets the limit.
        by: &'static str,
    },
    /// Not enough reserved huge pages.
    #[error(
        "an arena of {asked} in 2MiB pages does not fit: {free} of huge pages are free; reserve more (sysctl vm.nr_hugepages={pages}) or leave --page-size out"
    )]
    NoHugePages {
        /// The arena's size.
        asked: Size,
        /// What is free.
        free: Size,
        /// Pages that the arena needs.
        pages: u64,
    },
    /// The API would be open to the network.
    #[error(
        "{address} can be reached by other machines: give a --token-file, or listen on 127.0.0.1"
    )]
    TokenNeeded {
        /// The address asked for.
        address: SocketAddr,
    },
    /// The token file holds no usable token.
    #[error("{}: {reason}", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The socket's folder cannot be used.
    #[error("cannot use {} for the socket: {reason}", folder.display())]
    SocketFolder {
        /// The folder.
        folder: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl ConfigError {
    fn value(key: &'static str, reason: &'static str) -> Self {
        Self::Value { key, reason }
    }
}

#[cfg(test)]
pub(crate) mod tests;
