//! What a peer says before a stream starts: joining, questions, HELLO.
//!
//! Owns authorisation: who may ask what. A refusal says why and what to do, and
//! nothing else about what is stored here.

use std::sync::Arc;
use std::time::Duration;

use blockfilter::names::Name;
use replicator::frame::FrameBuf;
use replicator::identity::{IdentityError, Peer, Role, csr_key_sha256};
use replicator::session::{DiskInfo, ErrorCode, ErrorMessage, Hello, Rpc, RpcReply};
use replicator::token::TokenError;
use replicator::transport::{Channel, ChannelError, STRANGER_FRAME_MAX};
use replicator::wire::{Kind, WIRE_VERSION};
use uuid::Uuid;

use super::{HANDSHAKE_MAX, Known, Shared, Stranger, stream};
use crate::store::{DiskMeta, GroupMeta, GroupStore, StoreError};

/// Serves one connection to its end.
pub(super) fn serve(shared: &Arc<Shared>, mut channel: Channel, from: &str, stranger: Stranger) {
    let result = run(shared, &mut channel, from, stranger);
    if let Err(error) = result {
        tracing::info!(from, %error, "a connection ended");
    }
    channel.close();
}

fn run(
    shared: &Arc<Shared>,
    channel: &mut Channel,
    from: &str,
    stranger: Stranger,
) -> Result<(), ChannelError> {
    let peer = channel.peer()?;
    let (_known, _stranger) = if peer.is_some() {
        drop(stranger);
        let Some(known) = Known::enter(&shared.known) else {
            return refuse(channel, error(ErrorCode::Busy, "too many connections", None));
        };
        channel.trust_peer();
        (Some(known), None)
    } else {
        (None, Some(stranger))
    };
    let requests = if peer.is_none() { ANONYMOUS_REQUESTS } else { REQUESTS_MAX };
    for _ in 0..requests {
        let frame = channel.recv(HANDSHAKE_MAX)?;
        if peer.is_none() && channel.counters().received_bytes > ANONYMOUS_MAX as u64 {
            return refuse(channel, error(ErrorCode::NotAuthorised, "too much was sent", None));
        }
        match frame.kind() {
            Kind::Rpc => {
                let reply = match answer(shared, peer.as_ref(), frame.parse()?) {
                    Ok(reply) => reply,
                    Err(why) => RpcReply::Refused(why),
                };
                channel.send(&FrameBuf::message(Kind::RpcReply, &reply)?)?;
                channel.flush(HANDSHAKE_MAX)?;
            }
            Kind::Hello => {
                let hello: Hello = frame.parse()?;
                return match greet(shared, peer.as_ref(), &hello) {
                    Ok(group) => stream::run(shared, channel, &group, &hello, from),
                    Err(why) => refuse(channel, why),
                };
            }
            Kind::Bye => return Ok(()),
            _ => {
                let what = "the first message must be a request or HELLO";
                return refuse(channel, error(ErrorCode::Protocol, what, None));
            }
        }
    }
    refuse(channel, error(ErrorCode::Busy, "too many requests on one connection", None))
}

/// Sends an error and ends the connection.
pub(super) fn refuse(channel: &mut Channel, why: ErrorMessage) -> Result<(), ChannelError> {
    tracing::info!(code = ?why.code, message = %why.message, "refused");
    channel.send(&FrameBuf::message(Kind::Error, &why)?)?;
    channel.flush(Duration::from_secs(1))
}

pub(super) fn error(
    code: ErrorCode,
    message: impl Into<String>,
    hint: Option<&str>,
) -> ErrorMessage {
    ErrorMessage { code, message: message.into(), hint: hint.map(str::to_owned) }
}

fn answer(shared: &Shared, peer: Option<&Peer>, rpc: Rpc) -> Result<RpcReply, ErrorMessage> {
    match rpc {
        Rpc::Enrol { secret, csr, host } => enrol(shared, &secret, &csr, &host),
        Rpc::CreateGroup { group, uuid, disks } => {
            let agent = agent(peer)?;
            find_or_create(shared, agent, &group, uuid, &disks)?;
            Ok(RpcReply::Created)
        }
        Rpc::CheckGroup { group, uuid } => {
            let exists = find(shared, agent(peer)?, &group, uuid)?.is_some();
            Ok(RpcReply::Group { exists })
        }
        Rpc::HasTag { group, tag } => match find(shared, agent(peer)?, &group, None)? {
            Some(store) => Ok(RpcReply::Tag { used: store.has_tag(&tag) }),
            None => Ok(RpcReply::Tag { used: false }),
        },
    }
}

fn enrol(shared: &Shared, secret: &str, csr: &str, host: &str) -> Result<RpcReply, ErrorMessage> {
    let bad = |e: IdentityError| error(ErrorCode::Protocol, e.to_string(), None);
    let key = csr_key_sha256(csr).map_err(bad)?;
    let name = agent_name(host, &key);
    let files = shared.files.as_ref();
    let now = shared.clock.wall_us();
    // Durable before anything is issued; the same key may ask again.
    let redeemed = shared.tokens.redeem(files, secret, &key, &name, now).map_err(|e| match e {
        TokenError::Io(e) => error(ErrorCode::Storage, format!("the token's record: {e}"), None),
        other => {
            let hint = "make a new one with `standfast token create` at the target";
            error(ErrorCode::Token, other.to_string(), Some(hint))
        }
    })?;
    let cert = shared.authority.sign(csr, &redeemed.name, redeemed.role, now).map_err(bad)?;
    tracing::info!(agent = redeemed.name, role = redeemed.role.as_str(), "joined");
    Ok(RpcReply::Enrolled {
        agent: redeemed.name,
        role: redeemed.role,
        cert,
        ca: shared.authority.ca_pem().to_owned(),
    })
}

/// A name that says where it comes from and that no other key can have.
fn agent_name(host: &str, key_sha256: &str) -> String {
    let host: String = host
        .to_ascii_lowercase()
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
        .take(40)
        .collect();
    let host = if host.is_empty() { "agent" } else { &host };
    format!("{host}-{}", &key_sha256[..12])
}

fn agent(peer: Option<&Peer>) -> Result<&Peer, ErrorMessage> {
    match peer {
        Some(peer) if peer.role == Role::Agent => Ok(peer),
        Some(peer) => {
            let what = format!("a certificate for {} may not replicate", peer.role.as_str());
            Err(error(ErrorCode::NotAuthorised, what, Some("join with an agent's token")))
        }
        None => Err(error(
            ErrorCode::NotAuthorised,
            "this machine showed no certificate",
            Some("join first: `standfast join TOKEN`"),
        )),
    }
}

fn greet(
    shared: &Shared,
    peer: Option<&Peer>,
    hello: &Hello,
) -> Result<Arc<GroupStore>, ErrorMessage> {
    let agent = agent(peer)?;
    if hello.version != WIRE_VERSION {
        let what = format!(
            "the source speaks version {}, this target version {WIRE_VERSION}",
            hello.version
        );
        return Err(error(ErrorCode::Protocol, what, Some("install the same release on both")));
    }
    find_or_create(shared, agent, &hello.group, hello.group_uuid, &hello.disks)
}

fn find(
    shared: &Shared,
    agent: &Peer,
    group: &Name,
    uuid: Option<Uuid>,
) -> Result<Option<Arc<GroupStore>>, ErrorMessage> {
    let Some(store) = shared.store.group(group) else { return Ok(None) };
    let meta = store.state().meta;
    if meta.owner != agent.name {
        let what = format!("group {group} at the target belongs to another agent");
        let hint = "choose another name, or forget the group at the target";
        return Err(error(ErrorCode::NameTaken, what, Some(hint)));
    }
    if uuid.is_some_and(|uuid| uuid != meta.uuid) {
        let what = format!("the target holds another group with the name {group}");
        let hint = "choose another name, or forget the old group at the target";
        return Err(error(ErrorCode::NameTaken, what, Some(hint)));
    }
    Ok(Some(store))
}

fn find_or_create(
    shared: &Shared,
    agent: &Peer,
    group: &Name,
    uuid: Uuid,
    disks: &[DiskInfo],
) -> Result<Arc<GroupStore>, ErrorMessage> {
    let disks: Vec<DiskMeta> = disks
        .iter()
        .map(|d| DiskMeta { disk: d.disk.clone(), uuid: d.uuid, size_bytes: d.size_bytes })
        .collect();
    if let Some(store) = find(shared, agent, group, Some(uuid))? {
        if store.state().meta.disks != disks {
            let what = format!("the disks of group {group} are not those that the target holds");
            return Err(error(ErrorCode::Diverged, what, Some("protect them under another name")));
        }
        return Ok(store);
    }
    let meta = GroupMeta { group: group.clone(), uuid, owner: agent.name.clone(), disks };
    match shared.store.create_group(meta) {
        Ok(store) => Ok(store),
        // Another connection of the same agent was faster.
        Err(StoreError::GroupExists(_)) => find(shared, agent, group, Some(uuid))?
            .ok_or_else(|| error(ErrorCode::Busy, "the group is just being made", None)),
        Err(StoreError::Invalid(what)) => Err(error(ErrorCode::Protocol, what, None)),
        Err(failure) => {
            let hint = "look at the target's disk space and log";
            Err(error(ErrorCode::Storage, failure.to_string(), Some(hint)))
        }
    }
}

/// Requests on one connection.
const REQUESTS_MAX: usize = 1024;
const ANONYMOUS_REQUESTS: usize = 4;
/// What a peer without certificate may send in all, TLS included.
const ANONYMOUS_MAX: usize = STRANGER_FRAME_MAX;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agents_name_is_plain_and_its_keys_own() {
        let key = "0123456789abcdef";
        assert_eq!(agent_name("DB 01.example", key), "db01example-0123456789ab");
        assert_eq!(agent_name("../..", key), "agent-0123456789ab");
        assert!(agent_name(&"x".repeat(300), key).len() <= 64);
    }
}
