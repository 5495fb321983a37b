//! The values of the configuration as people write them: text in, typed value out, and exactly back.

use std::fmt;
use std::net::{AddrParseError, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

/// A value that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Not a size.
    #[error("`{0}` is not a size; sizes read like 8GiB or 512MiB")]
    Size(String),
    /// Not a duration.
    #[error("`{0}` is not a duration; durations read like 250ms or 10m")]
    Duration(String),
    /// Not an address to listen on.
    #[error("`{0}` is not an address; write ADDRESS:PORT (127.0.0.1:7411, [::1]:7411) or none")]
    Address(String),
}

/// A size as a person writes it: `8GiB`, `512MiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let size = ByteSize::from_str(text);
        size.map(|s| Self(s.as_u64()))
            .map_err(|_| ValueError::Size(text.to_owned()))
    }
}

impl TryFrom<String> for Size {
    type Error = ValueError;

    fn try_from(text: String) -> Result<Self, ValueError> {
        text.parse()
    }
}

impl fmt::Display for Size {
    /// Exact, in the largest unit that divides it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        let unit = units
            .iter()
            .find(|(bytes, _)| self.0 >= *bytes && self.0.is_multiple_of(*bytes));
        match unit {
            Some((bytes, name)) => write!(f, "{}{name}", self.0 / bytes),
            None => write!(f, "{}B", self.0),
        }
    }
}

impl From<Size> for String {
    fn from(size: Size) -> Self {
        size.to_string()
    }
}

/// A duration as a person writes it: `250ms`, `10m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let span = humantime::parse_duration(text);
        span.map(Self)
            .map_err(|_| ValueError::Duration(text.to_owned()))
    }
}

impl TryFrom<String> for Span {
    type Error = ValueError;

    fn try_from(text: String) -> Result<Self, ValueError> {
        text.parse()
    }
}

impl From<Span> for String {
    fn from(span: Span) -> Self {
        humantime::format_duration(span.0).to_string()
    }
}

/// Where the HTTP API listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Listen {
    /// Nowhere: engines only.
    None,
    /// On this address; port 0 takes a free one.
    On(SocketAddr),
}

impl FromStr for Listen {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text == "none" {
            return Ok(Self::None);
        }
        let address: Result<SocketAddr, AddrParseError> = text.parse();
        address
            .map(Self::On)
            .map_err(|_| ValueError::Address(text.to_owned()))
    }
}

impl TryFrom<String> for Listen {
    type Error = ValueError;

    fn try_from(text: String) -> Result<Self, ValueError> {
        text.parse()
    }
}

impl From<Listen> for String {
    fn from(listen: Listen) -> Self {
        match listen {
            Listen::None => "none".to_owned(),
            Listen::On(address) => address.to_string(),
        }
    }
}

/// Pages of the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum Pages {
    /// Ordinary pages.
    #[serde(rename = "4KiB")]
    #[value(name = "4KiB")]
    Base,
    /// Huge pages, which must have been reserved (`vm.nr_hugepages`).
    #[serde(rename = "2MiB")]
    #[value(name = "2MiB")]
    Huge,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}
