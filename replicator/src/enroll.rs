//! Joining a target, and the agent's questions to it.
//!
//! Owns `A/pki` and `A/agent.json`. Holds: the secret is sent only to a target
//! whose authority is the token's; the key is durable before the token is used,
//! so an interrupted join is repeated with the same token and completes; a
//! machine has joined once `agent.json` exists, which is written last.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use blockfilter::engine::{Clock, Files, make_dir, read_file, replace_file};
use serde::{Deserialize, Serialize};

use crate::frame::{FrameBuf, FrameError};
use crate::identity::{
    self, CA_PEM, CERT_PEM, IdentityError, KEY_PEM, client_tls, joining_tls, new_csr, new_key,
};
use crate::session::{ErrorCode, ErrorMessage, Rpc, RpcReply};
use crate::token::{Token, TokenError};
use crate::transport::{Channel, ChannelError};
use crate::wire::Kind;

/// `A/agent.json`: where this machine replicates to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentConfig {
    /// This machine's id: its certificate's name.
    pub agent: String,
    /// Where the target is: `host:port`, tried in order.
    pub targets: Vec<String>,
}

impl AgentConfig {
    /// Reads it; None if this machine has not joined.
    pub fn load(files: &dyn Files, dir: &Path) -> io::Result<Option<Self>> {
        let path = dir.join(AGENT_JSON);
        if !files.exists(&path) {
            return Ok(None);
        }
        let text = read_file(files, &path, CONFIG_MAX)?;
        serde_json::from_slice(&text).map(Some).map_err(|e| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{} is damaged: {e}", path.display()),
            )
        })
    }
}

/// Where certificates are, below the state directory.
pub fn pki_dir(dir: &Path) -> PathBuf {
    dir.join("pki")
}

/// Why joining or a question failed.
#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    /// The token's text.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// This machine has joined already.
    #[error("this machine has joined {} already, as {}", .0.targets.join(", "), .0.agent)]
    Joined(AgentConfig),
    /// Keys or certificates.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The target cannot be reached or is not the token's.
    #[error("{addr}: {error}")]
    Unreachable {
        /// The last address tried.
        addr: String,
        /// Why.
        error: ChannelError,
    },
    /// The target said no.
    #[error("{}", .0.message)]
    Refused(ErrorMessage),
    /// The target answered something else.
    #[error("unexpected answer of the target")]
    Unexpected,
    /// A message could not be made.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A file could not be read or written.
    #[error("{0}: {1}")]
    File(String, io::Error),
}

impl RpcError {
    /// The kind of refusal, if the target refused.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Refused(message) => Some(message.code),
            _ => None,
        }
    }
}

/// Joins: makes a key, sends secret and CSR, stores certificate and addresses in
/// `dir`. `host` is this machine's name, for people.
pub fn join(
    files: &dyn Files,
    clock: &Arc<dyn Clock>,
    dir: &Path,
    token: &str,
    host: &str,
) -> Result<AgentConfig, RpcError> {
    let token = Token::decode(token)?;
    let file = |path: &Path| {
        let path = path.display().to_string();
        move |e| RpcError::File(path, e)
    };
    if let Some(joined) = AgentConfig::load(files, dir).map_err(file(dir))? {
        return Err(RpcError::Joined(joined));
    }
    let pki = pki_dir(dir);
    make_dir(files, &pki).map_err(file(&pki))?;
    let key = durable_key(files, &pki.join(KEY_PEM))?;
    let tls = joining_tls(&token.ca_sha256)?;
    let request =
        Rpc::Enrol { secret: token.secret.clone(), csr: new_csr(&key)?, host: host.to_owned() };
    let mut connection = RpcClient::dial(&token.addrs, tls, clock)?;
    let RpcReply::Enrolled { agent, cert, ca, .. } = connection.ask(&request)? else {
        return Err(RpcError::Unexpected);
    };
    for (name, text) in [(CA_PEM, &ca), (CERT_PEM, &cert)] {
        let path = pki.join(name);
        replace_file(files, &path, text.as_bytes()).map_err(file(&path))?;
    }
    let config = AgentConfig { agent, targets: token.addrs };
    let text = serde_json::to_vec_pretty(&config).map_err(io::Error::other);
    let path = dir.join(AGENT_JSON);
    text.and_then(|text| replace_file(files, &path, &text)).map_err(file(&path))?;
    Ok(config)
}

fn durable_key(files: &dyn Files, path: &Path) -> Result<String, RpcError> {
    let shown = path.display().to_string();
    if files.exists(path) {
        let text =
            read_file(files, path, CONFIG_MAX).map_err(|e| RpcError::File(shown.clone(), e))?;
        if let Ok(text) = String::from_utf8(text)
            && new_csr(&text).is_ok()
        {
            return Ok(text);
        }
    }
    let key = new_key()?;
    replace_file(files, path, key.as_bytes()).map_err(|e| RpcError::File(shown, e))?;
    Ok(key)
}

/// A connection for questions.
#[derive(Debug)]
pub struct RpcClient {
    channel: Channel,
}

impl RpcClient {
    /// Connects as the agent of `dir`.
    pub fn connect(
        files: &dyn Files,
        clock: &Arc<dyn Clock>,
        dir: &Path,
        config: &AgentConfig,
    ) -> Result<Self, RpcError> {
        Self::dial(&config.targets, client_tls(files, &pki_dir(dir))?, clock)
    }

    fn dial(
        addrs: &[String],
        tls: Arc<rustls::ClientConfig>,
        clock: &Arc<dyn Clock>,
    ) -> Result<Self, RpcError> {
        let mut last = RpcError::Unexpected;
        for addr in addrs {
            match Channel::connect(addr, tls.clone(), clock.clone(), TIMEOUT) {
                Ok(channel) => return Ok(Self { channel }),
                Err(error) => last = RpcError::Unreachable { addr: addr.clone(), error },
            }
        }
        Err(last)
    }

    /// Asks and waits for the answer; a refusal is [`RpcError::Refused`].
    pub fn ask(&mut self, rpc: &Rpc) -> Result<RpcReply, RpcError> {
        let addr = self.channel.peer_addr().map(|a| a.to_string()).unwrap_or_default();
        let lost = |error| RpcError::Unreachable { addr, error };
        let frame = FrameBuf::message(Kind::Rpc, rpc)?;
        let answer =
            self.channel.send(&frame).and_then(|()| self.channel.recv(TIMEOUT)).map_err(lost)?;
        match answer.kind() {
            Kind::RpcReply => match answer.parse()? {
                RpcReply::Refused(message) => Err(RpcError::Refused(message)),
                reply => Ok(reply),
            },
            Kind::Error => Err(RpcError::Refused(answer.parse()?)),
            _ => Err(RpcError::Unexpected),
        }
    }
}

impl Drop for RpcClient {
    fn drop(&mut self) {
        self.channel.close();
    }
}

/// A certificate for opening points over nbds: `ca.pem`, `cert.pem`, `key.pem`
/// in `out`, named as libnbd and qemu look for them too. Returns the paths.
pub fn write_viewer(
    files: &dyn Files,
    out: &Path,
    issued: &identity::Issued,
) -> Result<Vec<PathBuf>, RpcError> {
    let file = |path: &Path, e| RpcError::File(path.display().to_string(), e);
    make_dir(files, out).map_err(|e| file(out, e))?;
    let mut made = Vec::new();
    for (name, text) in [
        ("ca-cert.pem", &issued.ca_pem),
        ("client-cert.pem", &issued.cert_pem),
        ("client-key.pem", &issued.key_pem),
    ] {
        let path = out.join(name);
        replace_file(files, &path, text.as_bytes()).map_err(|e| file(&path, e))?;
        made.push(path);
    }
    Ok(made)
}

const AGENT_JSON: &str = "agent.json";
const CONFIG_MAX: u64 = 1 << 20;
const TIMEOUT: Duration = Duration::from_secs(10);
