//! Steps 7 and 8 of the walk of one write: from the journal to the target.

mod ahead;
mod background;
pub mod codec;
pub mod enroll;
pub mod epoch;
pub mod feed;
pub mod frame;
pub mod identity;
pub mod pace;
pub mod placed;
pub mod rest;
pub mod seed;
pub mod session;
pub mod shipper;
pub mod source;
pub mod status;
pub mod token;
pub mod transport;
pub mod wire;
