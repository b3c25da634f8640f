//! Step 1: NBD, from a client's bytes to requests and back.
//!
//! [`proto`] numbers · [`handshake`] what is agreed on · [`transmission`] what
//! a valid request is, how answers look (these three are pure; the group's
//! io_uring engine uses them as the blocking server does) · [`listen`] sockets ·
//! [`server`] a blocking server over [`crate::block::Export`] · [`file`] a
//! plain file as an export · [`client`] a client that reconnects.

pub mod client;
pub mod file;
pub mod handshake;
pub mod listen;
pub mod out;
pub mod proto;
pub mod server;
pub mod transmission;
