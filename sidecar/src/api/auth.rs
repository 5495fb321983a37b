//! The token that clients must send when the sidecar is given one.
//!
//! Never logs the token, and compares digests in constant time, so that the time of an answer says nothing about how much of a
//! guess was right.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::config::ConfigError;
use crate::engine::socket::is_trusted;

/// Shortest token that is accepted, in bytes.
pub const TOKEN_MIN: usize = 8;

/// Longest token that is accepted, in bytes.
pub const TOKEN_MAX: usize = 4096;

/// The digest of a token.
#[derive(Clone, Copy)]
pub struct Token([u8; 32]);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Token {
    /// Reads the sidecar's token file, if there is to be one; white space around the token does not belong to it. Who may write
    /// the file decides who may call: it must be this user's or root's, and nobody else's to write.
    ///
    /// # Errors
    /// [`ConfigError::Unreadable`], [`ConfigError::Token`].
    pub fn load(path: Option<&Path>) -> Result<Option<Self>, ConfigError> {
        let Some(path) = path else { return Ok(None) };
        let token = Self::digest(&read_token(path)?);
        check_writers(path)?;
        Ok(Some(token))
    }

    /// A token from its text.
    pub fn digest(text: &str) -> Self {
        Self(Sha256::digest(text.as_bytes()).into())
    }

    /// Whether the request carries this token.
    pub fn allows(&self, headers: &HeaderMap) -> bool {
        let sent = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| Self::digest(token.trim()));
        sent.is_some_and(|sent| self.0.ct_eq(&sent.0).into())
    }
}

/// Refuses a token file into which another user could write a token of theirs.
///
/// # Errors
/// [`ConfigError::Unreadable`], [`ConfigError::Token`].
pub fn check_writers(path: &Path) -> Result<(), ConfigError> {
    let meta = fs::metadata(path).map_err(|source| ConfigError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    let own = rustix::process::geteuid().as_raw();
    match open_to_others(meta.uid(), meta.mode(), own) {
        None => Ok(()),
        Some(reason) => Err(ConfigError::Token {
            path: path.to_owned(),
            reason,
        }),
    }
}

/// Why a file of user `owner` is not only in the hands of user `own` and root, if so.
fn open_to_others(owner: u32, mode: u32, own: u32) -> Option<&'static str> {
    if !is_trusted(owner, own) {
        Some("it belongs to another user, who can change the token")
    } else if mode & 0o022 != 0 {
        Some("other users can write to it; chmod go-w it")
    } else {
        None
    }
}

/// The text of a token file, checked; what a client sends.
///
/// # Errors
/// [`ConfigError::Unreadable`], [`ConfigError::Token`].
pub fn read_token(path: &Path) -> Result<String, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    let token = text.trim();
    let printable = token.bytes().all(|b| b.is_ascii_graphic());
    let reason = if token.len() < TOKEN_MIN {
        "a token has at least 8 characters"
    } else if token.len() > TOKEN_MAX {
        "a token has at most 4096 characters"
    } else if !printable {
        "a token is one word of printable ASCII characters"
    } else {
        return Ok(token.to_owned());
    };
    Err(ConfigError::Token {
        path: path.to_owned(),
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn sent(value: &str) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        Token::digest("open-sesame").allows(&headers)
    }

    #[test]
    fn only_the_right_token_opens() {
        assert!(sent("Bearer open-sesame"));
        assert!(sent("bearer  open-sesame"));
        for wrong in [
            "open-sesame",
            "Basic open-sesame",
            "Bearer open-sesam",
            "Bearer ",
            "Bearer open-sesamee",
        ] {
            assert!(!sent(wrong), "{wrong}");
        }
        assert!(!Token::digest("open-sesame").allows(&HeaderMap::new()));
    }

    #[test]
    fn a_token_file_is_trimmed_and_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let read = |text: &str| {
            fs::write(&path, text).unwrap();
            read_token(&path)
        };
        assert_eq!(read("open-sesame\n").unwrap(), "open-sesame");
        for wrong in ["", "short", "two words of it", "ümlauted-token"] {
            assert!(
                matches!(read(wrong), Err(ConfigError::Token { .. })),
                "{wrong}"
            );
        }
        assert!(matches!(
            read(&"x".repeat(5000)),
            Err(ConfigError::Token { .. })
        ));
        assert!(matches!(
            read_token(Path::new("/nowhere")),
            Err(ConfigError::Unreadable { .. })
        ));
    }

    #[test]
    fn a_token_file_that_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        fs::write(&path, "open-sesame").unwrap();
        let load = |mode| {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            Token::load(Some(&path))
        };
        for mode in [0o600, 0o640, 0o444] {
            assert!(load(mode).is_ok(), "{mode:o}");
        }
        for mode in [0o620, 0o602] {
            let error = load(mode).unwrap_err().to_string();
            assert!(error.contains("chmod go-w"), "{error}");
        }
    }

    #[test]
    fn a_token_file_of_another_user_is_refused() {
        for own in [1000, 0] {
            assert_eq!(open_to_others(own, 0o600, own), None);
            assert_eq!(open_to_others(0, 0o600, own), None);
            let reason = open_to_others(65_534, 0o600, own).unwrap();
            assert!(reason.contains("another user"), "{reason}");
        }
        // And where this user may give a file away, the file itself.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        fs::write(&path, "open-sesame").unwrap();
        if std::os::unix::fs::chown(&path, Some(65_534), None).is_ok() {
            let error = Token::load(Some(&path)).unwrap_err().to_string();
            assert!(error.contains("another user"), "{error}");
        }
    }

    #[test]
    fn the_token_is_not_shown() {
        assert!(!format!("{:?}", Token::digest("open-sesame")).contains("sesame"));
    }
}
