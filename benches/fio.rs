//! One run of fio, and what it says.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::sys;

/// What fio measured.
#[derive(Clone, Debug, Default)]
pub(crate) struct Run {
    /// Reads and writes a second.
    pub(crate) iops: f64,
    /// MiB a second, both directions.
    pub(crate) mib: f64,
    /// Reads and writes in all.
    pub(crate) ops: f64,
    /// CPU microseconds of fio itself.
    pub(crate) client_us: f64,
    /// Latency of writes at the 99th and 99.9th percentile, microseconds.
    pub(crate) write_p99_us: f64,
    /// See `write_p99_us`.
    pub(crate) write_p999_us: f64,
}

/// Runs fio with `target` (engine and place) and `load`; ends by itself after `seconds`
/// unless `seconds` is None and the load has an end of its own.
pub(crate) fn run(target: &[String], load: &[String], seconds: Option<u64>) -> Result<Run> {
    let limit = seconds.unwrap_or(600) + 120;
    let mut command = Command::new("timeout");
    command.args(["-k", "5", &limit.to_string(), "fio", "--name=cell", "--randrepeat=0"]);
    command.args(["--norandommap", "--output-format=json"]);
    if let Some(seconds) = seconds {
        command.args(["--time_based".into(), format!("--runtime={seconds}")]);
    }
    command.args(target).args(load);
    let text = sys::output(&mut command)?;
    let json = text.find('{').map_or("", |at| &text[at..]);
    let json: Value = serde_json::from_str(json).context("fio's answer is not JSON")?;
    let run = parse(&json["jobs"][0]).context("fio's answer lacks a field")?;
    ensure!(json["jobs"][0]["error"] == 0, "fio saw an I/O error");
    ensure!(run.ops > 0.0, "fio completed nothing");
    Ok(run)
}

fn parse(job: &Value) -> Option<Run> {
    let both = |field: &str| Some(job["read"][field].as_f64()? + job["write"][field].as_f64()?);
    let percentile = |name: &str| job["write"]["clat_ns"]["percentile"][name].as_f64();
    let busy = (job["usr_cpu"].as_f64()? + job["sys_cpu"].as_f64()?) / 100.0;
    Some(Run {
        iops: both("iops")?,
        mib: both("bw_bytes")? / f64::from(1 << 20),
        ops: both("total_ios")?,
        client_us: busy * job["job_runtime"].as_f64()? * 1000.0,
        write_p99_us: percentile("99.000000").unwrap_or(0.0) / 1000.0,
        write_p999_us: percentile("99.900000").unwrap_or(0.0) / 1000.0,
    })
}
