//! Names of groups, disks and tags, and positions in the journal.
//!
//! Names appear in NBD export names, file names and metric labels, so they are
//! restricted once, here, to `[a-z0-9][a-z0-9_-]{0,62}`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A group's, disk's or tag's name: 1 to 63 of `[a-z0-9_-]`, starting with a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let bytes = text.as_bytes();
        let plain = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let rest = |b: &u8| plain(b) || *b == b'_' || *b == b'-';
        if bytes.is_empty()
            || bytes.len() > NAME_LEN_MAX
            || !plain(&bytes[0])
            || !bytes.iter().all(rest)
        {
            let shown: String = text.chars().take(NAME_LEN_MAX + 1).collect();
            return Err(NameError(shown));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The text is not a valid name; it is shown shortened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a name: use 1 to 63 of a-z, 0-9, '_' and '-', starting with a letter or digit"
)]
pub struct NameError(pub String);

/// Longest name, in bytes.
pub const NAME_LEN_MAX: usize = 63;

/// A position in the endless journal stream, in bytes. A record's LSN is its
/// batch's position plus its index in the batch; a *position* (durable,
/// applied, …) is an exclusive end: a record is durable iff `lsn < durable`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(into = "String", try_from = "String")]
pub struct Lsn(pub u64);

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// LSNs are decimal strings in JSON: they can pass 2^53.
impl From<Lsn> for String {
    fn from(lsn: Lsn) -> Self {
        lsn.0.to_string()
    }
}

impl TryFrom<String> for Lsn {
    type Error = std::num::ParseIntError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Lsn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_outside_the_alphabet_are_refused() {
        for bad in ["", "A", "-a", "_a", "a.b", "a/b", "a@b", "ä", &"a".repeat(64)] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
        for good in ["a", "0", "db01", "a-b_c", &"a".repeat(63)] {
            assert!(good.parse::<Name>().is_ok(), "{good:?}");
        }
    }
}
