//! The application's consent for `point create --app`: `DIR/hooks/freeze` and
//! `DIR/hooks/thaw`, each with five seconds.
//!
//! Holds: once freeze was started, thaw is run, whatever happens in between; a
//! freeze that fails or takes too long makes no point. The hooks get
//! `STANDFAST_EVENT`, `STANDFAST_GROUP`, `STANDFAST_DISKS`, `STANDFAST_POINT`,
//! `STANDFAST_DRILL=0` and `STANDFAST_TIMEOUT`.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use blockfilter::config::GroupConfig;
use blockfilter::engine::Clock;
use blockfilter::names::Name;

use crate::errors::{Exit, Failure, Outcome};

/// Both hooks, found and executable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hooks {
    freeze: PathBuf,
    thaw: PathBuf,
}

impl Hooks {
    /// Finds them; both must be there before anything is frozen.
    pub fn find(dir: &Path) -> Outcome<Self> {
        let hook = |name: &str| {
            let path = dir.join("hooks").join(name);
            let ready = std::fs::metadata(&path)
                .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
            if ready {
                return Ok(path);
            }
            let what = "an application-consistent point needs hooks";
            Err(Failure::coded(Exit::NotFound, 10, what)
                .why(format!("{} is missing or not executable", path.display()))
                .hint("put executables freeze and thaw there, or leave --app out"))
        };
        Ok(Self { freeze: hook("freeze")?, thaw: hook("thaw")? })
    }

    /// Runs `act` between freeze and thaw.
    pub fn around<T>(
        &self,
        config: &GroupConfig,
        tag: Option<&Name>,
        clock: &dyn Clock,
        act: impl FnOnce() -> T,
    ) -> Outcome<T> {
        let frozen = run(&self.freeze, "freeze", config, tag, clock);
        let result = frozen.map(|()| act());
        let thawed = run(&self.thaw, "thaw", config, tag, clock);
        let value = result?;
        thawed.map(|()| value)
    }
}

fn run(
    hook: &Path,
    event: &str,
    config: &GroupConfig,
    tag: Option<&Name>,
    clock: &dyn Clock,
) -> Outcome {
    let failed = |why: String| {
        Failure::coded(Exit::Failed, 12, format!("the {event} hook failed"))
            .why(why)
            .hint(format!("try it by hand: {}", hook.display()))
    };
    let disks: Vec<&str> = config.disks.iter().map(|d| d.disk.as_str()).collect();
    let mut child = Command::new(hook)
        .env("STANDFAST_EVENT", event)
        .env("STANDFAST_GROUP", config.group.as_str())
        .env("STANDFAST_DISKS", disks.join(" "))
        .env("STANDFAST_POINT", tag.map_or("", |t| t.as_str()))
        .env("STANDFAST_DRILL", "0")
        .env("STANDFAST_TIMEOUT", LIMIT.as_secs().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|e| failed(e.to_string()))?;
    let deadline = clock.mono_us() + LIMIT.as_micros() as u64;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(failed(status.to_string())),
            Ok(None) if clock.mono_us() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(format!("it took longer than {} s", LIMIT.as_secs())));
            }
            Err(error) => return Err(failed(error.to_string())),
        }
    }
}

const LIMIT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;
    use blockfilter::engine::real::RealClock;

    fn hooks(dir: &Path, freeze: &str) -> Hooks {
        let folder = dir.join("hooks");
        std::fs::create_dir_all(&folder).unwrap();
        let log = dir.join("log");
        for (name, body) in [("freeze", freeze), ("thaw", "true")] {
            let path = folder.join(name);
            let text = format!("#!/bin/sh\necho $STANDFAST_EVENT >> {}\n{body}\n", log.display());
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        Hooks::find(dir).unwrap()
    }

    fn config() -> GroupConfig {
        serde_json::from_value(serde_json::json!({
            "group": "g", "uuid": uuid::Uuid::nil(), "disks": [], "journal": "/j",
            "journal_bytes": 0, "chunk_bytes": 0, "arena_bytes": 0, "fuse": null,
        }))
        .unwrap()
    }

    #[test]
    fn thaw_runs_after_a_freeze_that_failed_and_no_point_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let clock = RealClock::new();
        let hooks = hooks(dir.path(), "exit 3");
        let failure =
            hooks.around(&config(), None, &clock, || panic!("a point was made")).unwrap_err();
        assert_eq!(failure.exit, Exit::Failed);
        let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
        assert_eq!(log, "freeze\nthaw\n");
    }

    #[test]
    fn missing_hooks_are_exit_code_4() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Hooks::find(dir.path()).unwrap_err().exit, Exit::NotFound);
    }
}
