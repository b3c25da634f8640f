//! What the whole-system tests share.
//!
//! | module | what it is for |
//! |---|---|
//! | [`wait`] | waiting for a condition with a deadline, the only pause in tests |
//! | [`run`] | the built `standfast` and other programs, with time limits |
//! | [`process`] | daemons that end with the test, however it ends |
//! | [`points`] | opening points and holding them against the oracle |
//! | [`simgroup`] | the filter over simulated files |
//! | [`filter`] | a filter process alone |
//! | [`proxy`] | a line to the target that can be cut, silent or slow |
//! | [`site`] | a target and an agent in a temporary folder |
//! | [`nbd`] | a small NBD client of its own: a second reading of the protocol |
//! | [`oracle`] | what a disk may contain, given what was written: the checker of prefixes |
//! | [`writer`] | writers that stamp every sector and keep the history |
//!
//! Nothing here is used by the product. A missing program or privilege fails a
//! test with what to install, it never skips silently.
#![allow(clippy::unwrap_used, reason = "a test harness stops at the first surprise")]

pub mod filter;
pub mod nbd;
pub mod oracle;
pub mod points;
pub mod process;
pub mod proxy;
pub mod run;
pub mod simgroup;
pub mod site;
pub mod wait;
pub mod writer;

pub use blockfilter::engine::record::Rng;
pub use wait::wait_until;

/// The seed of this run: `STANDFAST_SEED`, else one that differs each time. Printed,
/// so that a failure can be repeated.
pub fn seed(test: &str) -> u64 {
    use blockfilter::engine::Clock as _;
    let given = std::env::var("STANDFAST_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| blockfilter::engine::real::RealClock::new().wall_us());
    println!("{test}: STANDFAST_SEED={seed}");
    seed
}
