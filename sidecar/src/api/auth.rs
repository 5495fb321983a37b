//! The token that clients must send when the sidecar is given one.
//!
//! Never logs the token, and compares digests, so that the time of an answer says nothing about how much of a guess was right.

use std::fmt;
use std::fs;
use std::path::Path;

use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};

use crate::config::ConfigError;

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
    /// Reads the token file, if there is to be one; white space around the token does not belong to it.
    ///
    /// # Errors
    /// [`ConfigError::Unreadable`], [`ConfigError::Token`].
    pub fn load(path: Option<&Path>) -> Result<Option<Self>, ConfigError> {
        path.map(|path| Ok(Self::digest(&read_token(path)?)))
            .transpose()
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
        sent.is_some_and(|sent| self.same(&sent))
    }

    /// Looks at every byte whatever it finds.
    fn same(&self, other: &Self) -> bool {
        let pairs = self.0.iter().zip(&other.0);
        pairs.fold(0, |differing, (a, b)| differing | (a ^ b)) == 0
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
    fn the_token_is_not_shown() {
        assert!(!format!("{:?}", Token::digest("open-sesame")).contains("sesame"));
    }
}
