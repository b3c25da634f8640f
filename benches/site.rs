//! One installation of ours with one protected group: a target, an agent, a disk.
//!
//! Everything of it is in one folder; when a [`Site`] goes out of scope the group is
//! unprotected, both daemons stopped and the folder removed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::sys::{self, Proc, wait_for};

/// What a site is made of.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The folder that holds everything; made here.
    pub(crate) folder: PathBuf,
    /// The disk's image, already made.
    pub(crate) image: PathBuf,
    /// Bytes of the journal.
    pub(crate) journal_bytes: u64,
    /// Where the journal is, if not in the folder; removed with the site.
    pub(crate) journal: Option<PathBuf>,
}

/// A running installation.
#[derive(Debug)]
pub(crate) struct Site {
    plan: Plan,
    program: PathBuf,
    target: Option<Proc>,
    agent: Option<Proc>,
    /// The disk's NBD URI.
    pub(crate) uri: String,
    /// From the start of `protect` until the target could serve all of it.
    pub(crate) seed_seconds: f64,
    /// The part of it until `protect` returned: among other things it makes the journal.
    pub(crate) protect_seconds: f64,
}

impl Site {
    /// Starts it all and waits until the target holds a complete copy.
    pub(crate) fn start(plan: Plan) -> Result<Self> {
        std::fs::create_dir_all(&plan.folder)?;
        let mut site = Self {
            plan,
            program: crate::program()?,
            target: None,
            agent: None,
            uri: String::new(),
            seed_seconds: 0.0,
            protect_seconds: 0.0,
        };
        let init = site.target_command(&["target", "init", "--listen", "127.0.0.1:0"])?;
        let token = init["token"].as_str().context("no token")?.to_owned();
        site.start_target()?;
        site.agent_command(&["join", &token])?;
        site.agent = Some(site.daemon("agent", &site.agent_dir())?);
        site.protect()?;
        Ok(site)
    }

    fn protect(&mut self) -> Result<()> {
        let start = sys::now_us();
        let disk = format!("d={}", self.plan.image.display());
        let size = self.plan.journal_bytes.to_string();
        let mut arguments = vec!["protect", GROUP, &disk, "--journal-size", &size];
        let journal = self.plan.journal.as_ref().map(|path| path.display().to_string());
        if let Some(journal) = &journal {
            arguments.extend(["--journal", journal]);
        }
        let answer = self.agent_command(&arguments)?;
        self.protect_seconds = sys::seconds_since(start);
        self.uri = answer["disks"][0]["uri"].as_str().context("no URI")?.to_owned();
        // One process that waits: asking for the status starts one every 10 ms, which takes from
        // the copy what the peers keep.
        let limit = format!("{}s", LONG.as_secs());
        self.agent_command(&["sync", GROUP, "--timeout", &limit])?;
        self.seed_seconds = sys::seconds_since(start);
        wait_for("the group to be protected", LONG, || {
            Ok((self.group()?["state"] == "protected").then_some(()))
        })?;
        Ok(())
    }

    /// Stops the target: from now on there is only the journal.
    pub(crate) fn stop_target(&mut self) {
        self.target = None;
    }

    /// Starts the target, or starts it again.
    pub(crate) fn start_target(&mut self) -> Result<()> {
        self.target = None;
        self.target = Some(self.daemon("target", &self.target_dir())?);
        Ok(())
    }

    /// Whether the target runs.
    pub(crate) fn replicates(&self) -> bool {
        self.target.is_some()
    }

    fn agent_dir(&self) -> PathBuf {
        self.plan.folder.join("a")
    }

    /// The target's state directory.
    pub(crate) fn target_dir(&self) -> PathBuf {
        self.plan.folder.join("t")
    }

    /// `agent run` or `target run`, ready.
    fn daemon(&self, role: &str, dir: &Path) -> Result<Proc> {
        let log = self.plan.folder.join(format!("{role}.log"));
        let before = std::fs::read_to_string(&log).unwrap_or_default().len();
        let mut command = Command::new(&self.program);
        command.args([role, "run", "--json", "--dir"]).arg(dir);
        // Theirs would be taken instead of the program's own.
        command.env_remove("GLIBC_TUNABLES").env_remove("STANDFAST_TUNED");
        let mut daemon = Proc::spawn(&mut command, &log)?;
        wait_for(&format!("{role} run to be ready"), SHORT, || {
            daemon.check()?;
            let text = std::fs::read_to_string(&log)?;
            Ok(text[before..].contains("\"ready\"").then_some(()))
        })?;
        Ok(daemon)
    }

    fn command(&self, dir: &Path, arguments: &[&str]) -> Result<Value> {
        let mut command = Command::new(&self.program);
        command.args(arguments).arg("--json").arg("--dir").arg(dir);
        Ok(serde_json::from_str(&sys::output(&mut command)?)?)
    }

    /// A command at the agent; its JSON.
    pub(crate) fn agent_command(&self, arguments: &[&str]) -> Result<Value> {
        self.command(&self.agent_dir(), arguments)
    }

    /// A command at the target; its JSON.
    pub(crate) fn target_command(&self, arguments: &[&str]) -> Result<Value> {
        self.command(&self.target_dir(), arguments)
    }

    /// The group's status at the source.
    pub(crate) fn group(&self) -> Result<Value> {
        Ok(self.agent_command(&["status", GROUP])?["groups"][0].take())
    }

    /// Our processes with their roles.
    pub(crate) fn roles(&self) -> Result<Vec<(String, u32)>> {
        let status = self.agent_command(&["status"])?;
        let mut roles = Vec::new();
        for process in status["processes"].as_array().context("no processes")? {
            let role = process["role"].as_str().unwrap_or_default().to_owned();
            if let (true, Some(pid)) = (role != "agent", process["pid"].as_u64()) {
                roles.push((role, pid as u32));
            }
        }
        let daemons = [("agent", &self.agent), ("target", &self.target)];
        for (role, daemon) in daemons {
            roles.extend(daemon.as_ref().map(|daemon| (role.to_owned(), daemon.pid())));
        }
        Ok(roles)
    }

    /// The filter's process.
    pub(crate) fn filter_pid(&self) -> Result<u32> {
        let roles = self.roles()?;
        let filter = roles.iter().find(|(role, _)| role == "filter");
        filter.map(|(_, pid)| *pid).context("no filter runs")
    }

    /// Bytes of the filter's memory for recent writes.
    pub(crate) fn arena_bytes(&self) -> Result<u64> {
        let path = self.agent_dir().join("groups").join(GROUP).join("group.json");
        let config: Value = serde_json::from_slice(&std::fs::read(path)?)?;
        config["arena_bytes"].as_u64().context("no arena_bytes")
    }

    /// An error unless the journal still keeps everything for the target.
    pub(crate) fn check_state(&self) -> Result<()> {
        let group = self.group()?;
        let state = group["state"].as_str().unwrap_or_default();
        ensure!(
            matches!(state, "protected" | "lagging" | "seeding") || !self.replicates(),
            "the group is {state}"
        );
        if matches!(state, "frozen" | "unjournaled" | "backing_failed") {
            bail!("the group is {state}");
        }
        Ok(())
    }

    /// Bytes of the journal in use, and in all.
    pub(crate) fn journal_used(&self) -> Result<(u64, u64)> {
        let journal = self.group()?["journal"].take();
        let bytes = |field: &str| journal[field].as_u64().context("no journal figures");
        Ok((bytes("used_bytes")?, bytes("capacity_bytes")?))
    }

    /// The disk's image.
    pub(crate) fn image(&self) -> &Path {
        &self.plan.image
    }

    /// Waits until everything written is on the disk's image and, while replicating, at
    /// the target: the backlog at the start and the seconds it took.
    pub(crate) fn quiesce(&self) -> Result<(f64, f64)> {
        let start = sys::now_us();
        let backlog = self.group()?["backlog_bytes"].as_f64().unwrap_or(0.0);
        if self.replicates() {
            self.agent_command(&["sync", GROUP, "--timeout", "600s"])?;
        }
        let drained = sys::seconds_since(start);
        wait_for("the write-back", LONG, || {
            let lsn = &self.group()?["lsn"];
            Ok((lsn["applied"] == lsn["admitted"] && !lsn["applied"].is_null()).then_some(()))
        })?;
        Ok((backlog, drained))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let roles = self.roles().unwrap_or_default();
        let released = self.uri.is_empty() || {
            let done = self.agent_command(&["unprotect", GROUP, "--force"]);
            done.inspect_err(|error| eprintln!("bench: {error:#}")).is_ok()
        };
        self.agent = None;
        self.target = None;
        if !released {
            for (_, pid) in roles {
                sys::signal(pid, rustix::process::Signal::KILL);
            }
        }
        if let Some(journal) = &self.plan.journal {
            let _ = std::fs::remove_file(journal);
        }
        let _ = std::fs::remove_dir_all(&self.plan.folder);
    }
}

/// The group's name.
pub(crate) const GROUP: &str = "g";
const SHORT: Duration = Duration::from_secs(30);
const LONG: Duration = Duration::from_secs(600);
