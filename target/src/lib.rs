//! Steps 9 to 13 of the walk of one write: from the received frame to the
//! served point.
//!
//! | step | module | what it does |
//! |---|---|---|
//! | 9 | [`server`], [`receiver`] | connections; what may be appended; RPO |
//! | 10 | [`store`] | segments, index runs, manifest, base image |
//! | 11 | [`points`] | recovery points: names, times, tags |
//! | 12 | [`view`], [`branch`] | the disks at a point; writes on top of it |
//! | 13 | [`export`] | export names to views and branches |

pub mod branch;
pub mod export;
pub mod points;
pub mod receiver;
pub mod server;
pub mod store;
pub mod view;
