//! The machine: clock, waiting, commands, processes that end with their owner,
//! CPU time from /proc.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use blockfilter::engine::Clock;
use blockfilter::engine::real::RealClock;
use rustix::process::{Pid, Signal, kill_process};

static CLOCK: LazyLock<Arc<RealClock>> = LazyLock::new(|| Arc::new(RealClock::new()));
static STOP: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// The clock, for those that want one.
pub(crate) fn clock() -> Arc<dyn Clock> {
    CLOCK.clone()
}

/// Monotonic microseconds.
pub(crate) fn now_us() -> u64 {
    CLOCK.mono_us()
}

/// Seconds since `start_us`.
pub(crate) fn seconds_since(start_us: u64) -> f64 {
    (now_us() - start_us) as f64 / 1e6
}

/// From now on SIGINT and SIGTERM end the run in order: filters outlive us otherwise.
pub(crate) fn catch_signals() -> Result<()> {
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, STOP.clone())?;
    }
    Ok(())
}

/// An error once a signal has come.
pub(crate) fn check_stop() -> Result<()> {
    if STOP.load(Ordering::SeqCst) { Err(anyhow!("told to stop")) } else { Ok(()) }
}

/// Looks again and again until there is something.
pub(crate) fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = now_us();
    loop {
        check_stop()?;
        if let Some(found) = look()? {
            return Ok(found);
        }
        if seconds_since(start) > limit.as_secs_f64() {
            bail!("waited {} s for {what}", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs a command to its end; its stdout.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let text = format!("{command:?}");
    let out = command.stdin(Stdio::null()).output().with_context(|| text.clone())?;
    if !out.status.success() {
        let stderr = String::from_utf8_lossy(&out.stderr);
        let lines: Vec<&str> = stderr.lines().collect();
        bail!("{text}: {}: {}", out.status, lines[lines.len().saturating_sub(5)..].join(" | "));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Writes everything dirty on the file system of `dir` to its device.
pub(crate) fn sync_fs(dir: &Path) -> Result<()> {
    let dir = File::open(dir)?;
    rustix::fs::syncfs(&dir)?;
    Ok(())
}

/// Whether a program is on the PATH.
pub(crate) fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).exists())
}

/// A child that is ended with SIGTERM, at last SIGKILL, when this goes out of scope.
#[derive(Debug)]
pub(crate) struct Proc(Child);

impl Proc {
    /// Starts it with its outputs in `log`.
    pub(crate) fn spawn(command: &mut Command, log: &Path) -> Result<Self> {
        let text = format!("{command:?}");
        let file = File::options().create(true).append(true).open(log)?;
        let stdout = file.try_clone()?;
        let child = command.stdin(Stdio::null()).stdout(stdout).stderr(file).spawn();
        Ok(Self(child.with_context(|| text)?))
    }

    /// Its id.
    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// An error if it has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        match self.0.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("a server ended early: {status}"),
        }
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(Some(_))) {
            return;
        }
        signal(self.pid(), Signal::TERM);
        let start = now_us();
        while seconds_since(start) < END.as_secs_f64() {
            if matches!(self.0.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends a signal to a process of ours.
pub(crate) fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// Whether a process runs: it exists and is no zombie.
pub(crate) fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

/// CPU microseconds used by a process so far, threads that ended included.
pub(crate) fn cpu_us(pid: u32) -> u64 {
    stat(&format!("/proc/{pid}/stat")).map_or(0, |(_, cpu)| cpu)
}

/// CPU microseconds of all kernel threads so far: best effort, for others'
/// work on the machine is in it too.
pub(crate) fn kernel_cpu_us() -> u64 {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let stats = entries.filter_map(|entry| {
        let id: u32 = entry.file_name().to_str()?.parse().ok()?;
        stat(&format!("/proc/{id}/stat"))
    });
    stats.filter(|(parent, _)| *parent == KTHREADD).map(|(_, cpu)| cpu).sum()
}

/// Parent and CPU time (user and system) of a stat file.
fn stat(path: &str) -> Option<(u32, u64)> {
    let text = std::fs::read_to_string(path).ok()?;
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    let per_second = rustix::param::clock_ticks_per_second();
    Some((fields.get(1)?.parse().ok()?, ticks * 1_000_000 / per_second))
}

/// CPU microseconds by role between two moments.
#[derive(Debug)]
pub(crate) struct CpuMeter {
    roles: Vec<(String, u32, u64)>,
    kernel: u64,
}

impl CpuMeter {
    /// Starts to count for processes with their roles.
    pub(crate) fn start(roles: &[(String, u32)]) -> Self {
        let now = roles.iter().map(|(role, pid)| (role.clone(), *pid, cpu_us(*pid)));
        Self { roles: now.collect(), kernel: kernel_cpu_us() }
    }

    /// What was used since, with `server` as the sum of the roles.
    pub(crate) fn end(&self) -> BTreeMap<String, f64> {
        let mut used = BTreeMap::new();
        let mut server = 0.0;
        for (role, pid, before) in &self.roles {
            let spent = cpu_us(*pid).saturating_sub(*before) as f64;
            server += spent;
            *used.entry(role.clone()).or_insert(0.0) += spent;
        }
        used.insert("server".into(), server);
        used.insert("kernel".into(), kernel_cpu_us().saturating_sub(self.kernel) as f64);
        used
    }
}

/// How long a server may take to end.
const END: Duration = Duration::from_secs(20);
/// The parent of all kernel threads.
const KTHREADD: u32 = 2;
