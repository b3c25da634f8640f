//! The program `standfast`: what people and scripts talk to.
//!
//! | part | module |
//! |---|---|
//! | the command surface, one file a noun | [`cli`] |
//! | failures: code, exit code, what, why, what to do | [`errors`] |
//! | what goes to stdout and stderr, and progress | [`output`], [`progress`] |
//! | sizes, durations, positions of journal and arena | [`units`] |
//! | the processes: agent, target, their control sockets, supervision | [`daemon`] |
//!
//! Nothing here touches a disk's bytes: commands ask daemons, daemons start and
//! watch the processes of the other crates. stdout carries the answer (one JSON
//! document with `--json`), stderr everything else.

pub mod cli;
pub mod daemon;
pub mod errors;
pub mod output;
pub mod progress;
pub mod units;
