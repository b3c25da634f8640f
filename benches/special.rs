//! Cells that are no plain load: each leaves figures in the report.

mod copy;
mod disk;
mod latency;
mod open;

use std::path::PathBuf;

use anyhow::{Context as _, Result, anyhow};
use blockfilter::block::Errno;
use blockfilter::nbd::client::{Client, ClientConfig};
use blockfilter::nbd::listen::Address;

use crate::report::{Figure, Report};
use crate::runner::Runner;
use crate::sys;

/// All of them, in the order in which they run.
pub(crate) const NAMES: &[&str] = &[
    "latency-fixed-rate",
    "flush-nothing-new",
    "restart-after-kill",
    "memory",
    "seed",
    "open-point",
];

/// Runs one of [`NAMES`]. A failure is a figure; only a signal ends the run.
pub(crate) fn run(name: &'static str, runner: &mut Runner, report: &mut Report) -> Result<()> {
    eprintln!("{name}");
    let figures = match name {
        "latency-fixed-rate" => latency::run(name, runner, report),
        "flush-nothing-new" => disk::flush(name, runner),
        "restart-after-kill" => open::restart(name, runner),
        "memory" => disk::memory(name, runner),
        "seed" => copy::seed(name, runner),
        _ => open::points(name, runner),
    };
    sys::check_stop()?;
    match figures {
        Ok(figures) => report.figures.extend(figures),
        Err(error) => {
            eprintln!("bench: {error:#}");
            runner.clear();
            report.figures.push(Figure::none(name, name, format!("{error:#}"), true));
        }
    }
    Ok(())
}

/// A client for a URI as ours look: `nbd+unix:///EXPORT?socket=PATH`.
fn connect(uri: &str, timeout: std::time::Duration) -> Result<Client> {
    let rest = uri.strip_prefix("nbd+unix:///").context("not a Unix socket's URI")?;
    let (export, socket) = rest.split_once("?socket=").context("no socket in the URI")?;
    let (export, socket) = (unescape(export), PathBuf::from(unescape(socket)));
    let mut config = ClientConfig::new(Address::Unix(socket), &export);
    config.connect_timeout = timeout;
    Ok(Client::connect(config, sys::clock())?)
}

/// An NBD error as an error.
fn nbd<T>(result: Result<T, Errno>) -> Result<T> {
    result.map_err(|errno| anyhow!("the NBD server answers {errno:?}"))
}

/// Percent-encoding undone.
fn unescape(text: &str) -> String {
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let code = part.get(..2).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        bytes.push(code.unwrap_or(b'%'));
        bytes.extend_from_slice(
            part.get(if code.is_some() { 2 } else { 0 }..).unwrap_or_default().as_bytes(),
        );
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_is_unescaped() {
        assert_eq!(unescape("g.d%40p1-2"), "g.d@p1-2");
        assert_eq!(unescape("50%"), "50%");
    }
}
