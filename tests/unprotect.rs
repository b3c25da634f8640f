//! `unprotect` when something is in its way: nothing is lost, and the group is served
//! and watched as before until it is gone.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockfilter::arena::Word;
use e2e::nbd::Client;
use e2e::process::kill_and_wait;
use e2e::run::{require, tool};
use e2e::site::Site;
use e2e::wait::Deadline;
use e2e::wait_until;

const MIB: u64 = 1 << 20;

fn image(site: &Site, name: &str) -> PathBuf {
    let path = site.path(name);
    File::create(&path).unwrap().set_len(4 * MIB).unwrap();
    path
}

/// Writes `byte` to the first 64 KiB of the disk, flushed.
fn fill(uri: &str, byte: u8) {
    let mut client = Client::connect(uri, Duration::from_secs(60)).unwrap();
    client.write(0, &[byte; 65536], true).unwrap();
}

/// A site whose group `g` is in sync and begins with `byte`, and its disk's image.
fn protected(name: &str, byte: u8) -> (Site, PathBuf) {
    let site = Site::start(name);
    let disk = image(&site, "d.img");
    let uri = site.protect("g", &[("d", &disk)], &["--journal-size", "64MiB"]).remove(0);
    site.wait_protected("g");
    fill(&uri, byte);
    (site, disk)
}

fn journal_of(site: &Site) -> PathBuf {
    site.agent_dir().join("groups/g/journal")
}

fn arena_of(site: &Site) -> PathBuf {
    let group = "g".parse().unwrap();
    let paths = blockfilter::config::GroupPaths::new(&site.agent_dir(), &group);
    let files = blockfilter::engine::real::RealFiles;
    blockfilter::config::GroupConfig::load(&files, &paths).unwrap().arena_path()
}

/// Both super blocks are gone, as is the filter.
fn damage(site: &mut Site, lose_memory: bool) {
    let filter = site.wait_pid("filter", "g", None);
    let mut agent = site.agent.take().unwrap();
    agent.kill();
    kill_and_wait(filter);
    if lose_memory {
        std::fs::remove_file(arena_of(site)).unwrap();
    }
    let file = File::options().write(true).open(journal_of(site)).unwrap();
    for at in [100, MIB + 100] {
        file.write_all_at(&[0xff; 64], at).unwrap();
    }
    site.start_agent();
}

#[test]
fn a_group_that_cannot_be_unprotected_stays_watched_and_force_gives_the_journal_up() {
    let (mut site, _) = protected("abandon", 7);
    damage(&mut site, true);
    let error = site.at_agent(&["unprotect", "g"]).fails_with(5).json_error().to_string();
    assert!(error.contains("--force"), "{error}");
    let listed = site.at_agent(&["status", "g"]).ok().json();
    assert_eq!(listed["groups"][0]["group"], "g", "still there: {listed}");
    let roles: Vec<_> = listed["processes"].as_array().unwrap().iter().collect();
    assert!(roles.iter().any(|p| p["role"] == "filter"), "watched again: {listed}");
    let done = site.at_agent(&["unprotect", "g", "--force"]).fails_with(3);
    let answer = done.json();
    assert_eq!(answer["abandoned"]["whole"], false, "{answer}");
    let kept = answer["abandoned"]["kept"].as_str().unwrap();
    assert!(Path::new(kept).exists(), "the journal is kept");
    assert!(done.json_error().to_string().contains("lost"), "{}", done.err());
    assert!(!site.agent_dir().join("groups/g").exists());
}

#[test]
fn a_journal_given_up_while_the_memory_is_there_loses_nothing() {
    let (mut site, disk) = protected("whole", 9);
    damage(&mut site, false);
    let answer = site.at_agent(&["unprotect", "g", "--force"]).ok().json();
    assert_eq!(answer["abandoned"]["whole"], true, "{answer}");
    assert!(std::fs::read(&disk).unwrap()[..65536] == [9; 65536]);
}

/// Giving a journal up is not begun before the disks can be written, and not forgotten.
#[test]
fn a_journal_is_given_up_only_when_the_disks_are_there() {
    let (mut site, disk) = protected("not-yet", 9);
    let journal = journal_of(&site);
    damage(&mut site, true);
    // Its file system is not mounted, say.
    std::fs::rename(&journal, site.path("elsewhere")).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&disk).unwrap();
    file.set_len(MIB).unwrap();
    site.at_agent(&["unprotect", "g", "--force"]).fails_with(1);
    assert!(!site.agent_dir().join("groups/g/unjournaled").exists(), "it may still be replayed");
    file.set_len(4 * MIB).unwrap();
    std::fs::rename(site.path("elsewhere"), &journal).unwrap();
    site.at_agent(&["unprotect", "g", "--force"]).fails_with(3);
}

/// Only the journal could write again what a failed sync of the disks dropped.
#[test]
fn a_journal_given_up_after_a_failed_sync_may_have_lost_something() {
    let (mut site, _) = protected("unsynced", 9);
    damage(&mut site, false);
    let arena = std::fs::OpenOptions::new().write(true).open(arena_of(&site)).unwrap();
    arena.write_all_at(&1u64.to_le_bytes(), Word::Syncing as u64).unwrap();
    let answer = site.at_agent(&["unprotect", "g", "--force"]).fails_with(3).json();
    assert_eq!(answer["abandoned"]["whole"], false, "{answer}");
}

/// Its memory has all that the disks lack, whatever became of a sync.
#[test]
fn a_group_without_a_journal_is_given_back_whole_without_force() {
    let (mut site, disk) = protected("noted", 9);
    damage(&mut site, false);
    note(&site, "incarnation 1\n");
    let arena = std::fs::OpenOptions::new().write(true).open(arena_of(&site)).unwrap();
    arena.write_all_at(&1u64.to_le_bytes(), Word::Syncing as u64).unwrap();
    let answer = site.at_agent(&["unprotect", "g"]).ok().json();
    assert!(answer["abandoned"].is_null(), "{answer}");
    assert!(std::fs::read(&disk).unwrap()[..65536] == [9; 65536]);
}

/// An unprotect that gave a journal up and did not come to its end is not forgotten by the next,
/// though the journal itself had vanished.
#[test]
fn a_journal_that_was_given_up_is_told_of_until_the_end() {
    let (mut site, _) = protected("given-up", 9);
    damage(&mut site, false);
    note(&site, "given up\nincarnation 1\n");
    std::fs::remove_file(journal_of(&site)).unwrap();
    let answer = site.at_agent(&["unprotect", "g"]).fails_with(3).json();
    assert_eq!(answer["abandoned"]["whole"], false, "{answer}");
}

fn note(site: &Site, text: &str) {
    std::fs::write(site.agent_dir().join("groups/g/unjournaled"), text).unwrap();
}

#[test]
fn a_disk_in_use_is_said_at_once_even_with_force_and_goes_on_being_served() {
    require(&["losetup"]);
    let site = Site::start("in-use");
    let disk = image(&site, "d.img");
    let files = site.path("files");
    let shown = files.display().to_string();
    site.protect("g", &[("d", &disk)], &["--journal-size", "64MiB", "--fuse", &shown]);
    let file = files.join("d");
    let refused = |about: &str| {
        let time = Deadline::after(Duration::from_secs(10));
        let done = site.at_agent(&["unprotect", "g", "--force"]).fails_with(11);
        assert!(!time.passed(), "it took {:?}", time.elapsed());
        let error = done.json_error().to_string();
        assert!(error.contains(about), "{about:?} is not in {error}");
    };
    let device = tool("losetup", &["-f", "--show", &file.display().to_string()]).ok().out();
    refused(device.trim());
    tool("losetup", &["-d", device.trim()]).ok();
    let open = tool(
        "sh",
        &["-c", "sleep 600 < \"$0\" > /dev/null 2>&1 & echo $!", &file.display().to_string()],
    );
    let pid: u32 = open.ok().out().trim().parse().unwrap();
    refused(&pid.to_string());
    kill_and_wait(pid);
    let left = || (std::fs::metadata(&file).ok()?.len() == 4 * MIB).then_some(());
    wait_until("the file to be served", Duration::from_secs(20), left);
    site.at_agent(&["unprotect", "g", "--force"]).ok();
    assert!(!site.agent_dir().join("groups/g").exists());
}
