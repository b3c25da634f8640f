//! Join tokens: `sf1.` and base64url of [`Token`] as JSON.
//!
//! Owns the token's text and the target's record of it in `T/tokens`. Holds: the
//! secret is known to the holder of the token only, the target keeps its SHA-256;
//! a one-use token is marked used, durably, before anything is issued for it; the
//! same key may ask again with a used token and gets the same answer, so that
//! a join that was interrupted loses nothing.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use blockfilter::engine::{Files, make_dir, read_file, replace_file};
use ring::rand::SecureRandom;
use serde::{Deserialize, Serialize};

use crate::identity::{Role, sha256_hex};

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// Version, 1.
    pub v: u32,
    /// SHA-256 of the authority's certificate, hexadecimal.
    pub ca_sha256: String,
    /// Where the target is: `host:port`, tried in order.
    pub addrs: Vec<String>,
    /// What the certificate will be for.
    pub role: Role,
    /// 32 random bytes, base64url.
    pub secret: String,
    /// When it ends, seconds since 1970.
    pub exp: u64,
}

impl Token {
    /// The text that is handed to the user.
    pub fn encode(&self) -> String {
        let json = serde_json::to_vec(self).expect("strings and numbers always serialise");
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(json))
    }

    /// Reads a token's text.
    pub fn decode(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        let body = text.strip_prefix(PREFIX).filter(|b| b.len() <= TOKEN_MAX);
        let json = body.and_then(|b| URL_SAFE_NO_PAD.decode(b).ok());
        let token: Self =
            json.and_then(|j| serde_json::from_slice(&j).ok()).ok_or(TokenError::Malformed)?;
        if token.v != 1 || token.addrs.is_empty() {
            return Err(TokenError::Malformed);
        }
        Ok(token)
    }
}

/// Why a token is refused. All but `Io` are exit code 6.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Not the text of a token, or of a newer version.
    #[error("this is not a join token (it starts with sf1.); was it cut off?")]
    Malformed,
    /// The target never made it, or forgot it.
    #[error("the target does not know this token")]
    Unknown,
    /// It is too old.
    #[error("this token has expired")]
    Expired,
    /// Another machine joined with it.
    #[error("this token has been used")]
    Used,
    /// The record could not be read or written.
    #[error("the token's record: {0}")]
    Io(#[from] io::Error),
}

/// What the target keeps of a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    role: Role,
    exp: u64,
    reusable: bool,
    used_by_key: Option<String>,
    used_by: Option<String>,
}

/// The target's tokens.
#[derive(Debug)]
pub struct Tokens {
    dir: PathBuf,
    redeeming: Mutex<()>,
}

impl Tokens {
    /// Of the folder `dir` (`T/tokens`).
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), redeeming: Mutex::new(()) }
    }

    /// Makes a token; its record is durable on return.
    pub fn create(
        &self,
        files: &dyn Files,
        random: &dyn SecureRandom,
        order: &TokenOrder,
        wall_us: u64,
    ) -> Result<Token, TokenError> {
        let mut secret = [0; 32];
        random.fill(&mut secret).map_err(|_| io::Error::other("no random numbers"))?;
        let secret = URL_SAFE_NO_PAD.encode(secret);
        let exp = (wall_us / 1_000_000).saturating_add(order.ttl_seconds);
        let record = Record {
            role: order.role,
            exp,
            reusable: order.reusable,
            used_by_key: None,
            used_by: None,
        };
        make_dir(files, &self.dir)?;
        self.store(files, &secret, &record)?;
        Ok(Token {
            v: 1,
            ca_sha256: order.ca_sha256.clone(),
            addrs: order.addrs.clone(),
            role: order.role,
            secret,
            exp,
        })
    }

    /// Uses a token up for the machine with the public key `key_sha256`, whose
    /// certificate will say `name`. Durable on return.
    pub fn redeem(
        &self,
        files: &dyn Files,
        secret: &str,
        key_sha256: &str,
        name: &str,
        wall_us: u64,
    ) -> Result<Redeemed, TokenError> {
        let _one = self.redeeming.lock().unwrap_or_else(|e| e.into_inner());
        let path = self.path(secret);
        if secret.len() > 64 || !files.exists(&path) {
            return Err(TokenError::Unknown);
        }
        let text = read_file(files, &path, RECORD_MAX)?;
        let mut record: Record = serde_json::from_slice(&text).map_err(io::Error::other)?;
        if let (Some(key), Some(name)) = (&record.used_by_key, &record.used_by)
            && key == key_sha256
        {
            return Ok(Redeemed { name: name.clone(), role: record.role });
        }
        if wall_us >= record.exp.saturating_mul(1_000_000) {
            return Err(TokenError::Expired);
        }
        if !record.reusable {
            if record.used_by_key.is_some() {
                return Err(TokenError::Used);
            }
            record.used_by_key = Some(key_sha256.to_owned());
            record.used_by = Some(name.to_owned());
            self.store(files, secret, &record)?;
        }
        Ok(Redeemed { name: name.to_owned(), role: record.role })
    }

    fn path(&self, secret: &str) -> PathBuf {
        self.dir.join(format!("{}.json", sha256_hex(secret.as_bytes())))
    }

    fn store(&self, files: &dyn Files, secret: &str, record: &Record) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(record).map_err(io::Error::other)?;
        replace_file(files, &self.path(secret), &text)
    }
}

/// What a token is to say.
#[derive(Clone, Debug)]
pub struct TokenOrder {
    /// See [`Token::ca_sha256`].
    pub ca_sha256: String,
    /// See [`Token::addrs`].
    pub addrs: Vec<String>,
    /// See [`Token::role`].
    pub role: Role,
    /// Life in seconds.
    pub ttl_seconds: u64,
    /// May be used by several machines.
    pub reusable: bool,
}

/// What a used token gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redeemed {
    /// The certificate's name.
    pub name: String,
    /// The certificate's role.
    pub role: Role,
}

const PREFIX: &str = "sf1.";
const TOKEN_MAX: usize = 16 << 10;
const RECORD_MAX: u64 = 16 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use blockfilter::engine::real::RealFiles;
    use blockfilter::engine::record::SimFiles;

    fn order(reusable: bool) -> TokenOrder {
        TokenOrder {
            ca_sha256: "ab".repeat(32),
            addrs: vec!["127.0.0.1:7700".into()],
            role: Role::Agent,
            ttl_seconds: 60,
            reusable,
        }
    }

    fn tokens(dir: &Path, reusable: bool) -> (Tokens, Token) {
        let tokens = Tokens::new(&dir.join("tokens"));
        let random = ring::rand::SystemRandom::new();
        let token = tokens.create(&RealFiles, &random, &order(reusable), 1_000_000).unwrap();
        (tokens, token)
    }

    #[test]
    fn a_token_that_was_given_out_survives_a_power_cut() {
        let files = SimFiles::new();
        let tokens = Tokens::new(Path::new("/t/tokens"));
        let random = ring::rand::SystemRandom::new();
        let token = tokens.create(&files, &random, &order(false), 1_000_000).unwrap();
        let log = files.log();
        let after = log.crash_with(log.entries.len(), &mut |_| false);
        tokens.redeem(&after, &token.secret, "key", "m", 1_000_000).unwrap();
    }

    #[test]
    fn a_token_reads_back_and_a_cut_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let (_, token) = tokens(dir.path(), false);
        let text = token.encode();
        assert_eq!(Token::decode(&format!(" {text}\n")).unwrap(), token);
        assert!(matches!(Token::decode(&text[..text.len() - 9]), Err(TokenError::Malformed)));
        assert!(matches!(Token::decode("hello"), Err(TokenError::Malformed)));
    }

    #[test]
    fn the_secret_is_not_stored() {
        let dir = tempfile::tempdir().unwrap();
        let (_, token) = tokens(dir.path(), false);
        for entry in std::fs::read_dir(dir.path().join("tokens")).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(!text.contains(&token.secret));
            assert!(!path.to_string_lossy().contains(&token.secret));
        }
    }

    #[test]
    fn a_token_works_once_but_again_for_the_same_key() {
        let dir = tempfile::tempdir().unwrap();
        let (tokens, token) = tokens(dir.path(), false);
        let redeem =
            |key: &str, name: &str| tokens.redeem(&RealFiles, &token.secret, key, name, 2_000_000);
        assert_eq!(redeem("k1", "one").unwrap().name, "one");
        assert_eq!(redeem("k1", "other").unwrap().name, "one");
        assert!(matches!(redeem("k2", "two"), Err(TokenError::Used)));
    }

    #[test]
    fn expired_and_unknown_tokens_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (tokens, token) = tokens(dir.path(), false);
        let late = tokens.redeem(&RealFiles, &token.secret, "k", "n", 63_000_000);
        assert!(matches!(late, Err(TokenError::Expired)));
        let unknown = tokens.redeem(&RealFiles, "nothing", "k", "n", 0);
        assert!(matches!(unknown, Err(TokenError::Unknown)));
    }

    #[test]
    fn a_token_does_not_live_longer_than_asked() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::new(dir.path());
        let random = ring::rand::SystemRandom::new();
        let token = tokens.create(&RealFiles, &random, &order(true), 1_000_000).unwrap();
        let at = |wall_us| tokens.redeem(&RealFiles, &token.secret, "k", "n", wall_us);
        assert!(at(60_999_999).is_ok());
        assert!(matches!(at(61_000_000), Err(TokenError::Expired)));
    }

    #[test]
    fn a_reusable_token_admits_several() {
        let dir = tempfile::tempdir().unwrap();
        let (tokens, token) = tokens(dir.path(), true);
        for (key, name) in [("k1", "one"), ("k2", "two")] {
            let redeemed = tokens.redeem(&RealFiles, &token.secret, key, name, 0).unwrap();
            assert_eq!(redeemed.name, name);
        }
    }
}
