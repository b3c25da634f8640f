//! What the agent's machine asks the target, over the agent's certificate:
//! whether a group's name is free, whether a tag is in use; and joining.

use std::path::Path;
use std::sync::Arc;

use blockfilter::config::GroupConfig;
use blockfilter::engine::Clock;
use blockfilter::engine::real::RealFiles;
use blockfilter::names::Name;
use replicator::enroll::{AgentConfig, RpcClient, RpcError};
use replicator::session::{ErrorCode, Rpc, RpcReply};
use replicator::token::TokenError;
use replicator::transport::ChannelError;

use super::target::identity_failure;
use crate::errors::{Exit, Failure, IoContext, Outcome};

/// Where this machine replicates to; a failure if it has not joined.
pub fn joined(dir: &Path) -> Outcome<AgentConfig> {
    let config = AgentConfig::load(&RealFiles, dir).failed("cannot read agent.json")?;
    config.ok_or_else(|| {
        Failure::coded(Exit::WrongState, 20, "this machine has not joined a target")
            .why(format!("there is no agent.json in {}", dir.display()))
            .hint("get a token at the target (standfast token create), then: standfast join TOKEN")
    })
}

fn ask(dir: &Path, rpc: &Rpc, clock: Arc<dyn Clock>) -> Outcome<RpcReply> {
    let config = joined(dir)?;
    RpcClient::connect(&RealFiles, &clock, dir, &config)
        .and_then(|mut client| client.ask(rpc))
        .map_err(|e| rpc_failure(&e))
}

/// Refuses a group's name that the target holds.
pub fn check_group(dir: &Path, config: &GroupConfig, clock: Arc<dyn Clock>) -> Outcome {
    let rpc = Rpc::CheckGroup { group: config.group.clone(), uuid: None };
    let held = |why: &str| {
        let what = format!("the target already holds a group {}", config.group);
        Failure::coded(Exit::WrongState, 21, what).why(why).hint(format!(
            "choose another name, or delete it at the target: standfast forget {0} --confirm {0}",
            config.group
        ))
    };
    match ask(dir, &rpc, clock)? {
        RpcReply::Group { exists: false } => Ok(()),
        RpcReply::Group { exists: true } => Err(held("it is from an earlier protection")),
        other => Err(unexpected(&other)),
    }
}

/// Refuses a tag that a point of the group has.
pub fn check_tag(dir: &Path, config: &GroupConfig, tag: &Name, clock: Arc<dyn Clock>) -> Outcome {
    let rpc = Rpc::HasTag { group: config.group.clone(), tag: tag.clone() };
    match ask(dir, &rpc, clock)? {
        RpcReply::Tag { used: false } => Ok(()),
        RpcReply::Tag { used: true } => {
            let what = format!("tag {tag} is in use in group {}", config.group);
            Err(Failure::coded(Exit::Busy, 21, what).hint("choose another tag"))
        }
        other => Err(unexpected(&other)),
    }
}

fn unexpected(reply: &RpcReply) -> Failure {
    Failure::new(Exit::Failed, "the target gave an unexpected answer")
        .why(format!("{reply:?}"))
        .hint("use the same version of standfast on both sides")
}

/// Joins a target.
pub fn join(dir: &Path, token: &str, clock: &Arc<dyn Clock>) -> Outcome<AgentConfig> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    replicator::enroll::join(&RealFiles, clock, dir, token, &host).map_err(|e| rpc_failure(&e))
}

/// An error of the link to the target as a failure of a command.
pub fn rpc_failure(error: &RpcError) -> Failure {
    let text = error.to_string();
    match error {
        RpcError::Token(TokenError::Io(error)) => Failure::io("cannot use the token", error),
        RpcError::Token(_) => Failure::coded(Exit::NotAuthorised, 1, "the token cannot be used")
            .why(text)
            .hint("get another at the target: standfast token create --dir DIR"),
        RpcError::Joined(_) => {
            Failure::coded(Exit::Busy, 22, text).hint("use another --dir to join another target")
        }
        RpcError::Identity(error) => identity_failure(error),
        RpcError::Unreachable { error: ChannelError::Tls(_), .. } => {
            Failure::coded(Exit::NotAuthorised, 3, "target and agent do not trust each other")
                .why(text)
                .hint("was the target made anew? then join it with a token of its own")
        }
        RpcError::Unreachable { .. } => {
            Failure::coded(Exit::Unreachable, 3, "the target cannot be reached")
                .why(text)
                .hint("is it running (standfast target run), and is its port open from here?")
        }
        RpcError::Refused(message) => refused(message),
        RpcError::File(path, error) => Failure::io(format!("cannot use {path}"), error),
        RpcError::Unexpected | RpcError::Frame(_) => {
            Failure::new(Exit::Failed, "the target gave an unexpected answer").why(text)
        }
    }
}

fn refused(message: &replicator::session::ErrorMessage) -> Failure {
    let (exit, number) = match message.code {
        ErrorCode::NotAuthorised | ErrorCode::Token => (Exit::NotAuthorised, 2),
        ErrorCode::NameTaken | ErrorCode::Fenced | ErrorCode::Diverged => (Exit::WrongState, 22),
        ErrorCode::NotFound => (Exit::NotFound, 21),
        ErrorCode::Busy => (Exit::Busy, 23),
        ErrorCode::Protocol | ErrorCode::Storage | ErrorCode::Other => (Exit::Failed, 21),
    };
    let failure = Failure::coded(exit, number, "the target refused").why(message.message.clone());
    match (&message.hint, message.code) {
        (Some(hint), _) => failure.hint(hint.clone()),
        (None, ErrorCode::Token) => failure.hint("get another token: standfast token create"),
        (None, _) => failure,
    }
}
