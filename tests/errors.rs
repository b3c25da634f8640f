//! Bad input: a clear error with its exit code, nothing lost, nothing half made.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use e2e::process::{Daemon, kill_and_wait};
use e2e::run::{Done, finish, standfast, tool};
use e2e::site::Site;
use e2e::wait::Deadline;
use e2e::wait_until;

const MIB: u64 = 1 << 20;

fn image(site: &Site, name: &str, size: u64) -> String {
    let path = site.path(name);
    File::create(&path).unwrap().set_len(size).unwrap();
    path.display().to_string()
}

/// Tries to protect `pairs` as group `group`.
fn protect(site: &Site, group: &str, pairs: &[&str], more: &[&str]) -> Done {
    let mut arguments = vec!["protect", group];
    arguments.extend(pairs);
    if !more.contains(&"--journal-size") {
        arguments.extend(["--journal-size", "64MiB"]);
    }
    arguments.extend(more);
    site.at_agent(&arguments)
}

/// The error names what it is about and says what to do, and nothing is left.
#[track_caller]
fn refused(site: &Site, group: &str, done: Done, code: i32, about: &str) {
    let done = done.fails_with(code);
    let error = done.json_error();
    let text = error.to_string();
    assert_eq!(error["type"], "error", "{text}");
    assert_eq!(error["exit_code"], code, "{text}");
    assert!(text.contains(about), "{about:?} is not in {text}");
    assert!(error["code"].as_str().is_some_and(|c| c.starts_with("SF-")), "{text}");
    let left = site.agent_dir().join("groups").join(group);
    assert!(!left.exists(), "{} was left behind", left.display());
    let listed = site.at_agent(&["disk", "list"]).ok().json();
    assert!(!listed.to_string().contains(&format!("\"{group}.")), "{listed}");
}

#[test]
fn backing_files_that_cannot_be_protected_are_refused() {
    let site = Site::start("backing");
    let missing = site.path("no.img").display().to_string();
    refused(&site, "g1", protect(&site, "g1", &[&format!("d={missing}")], &[]), 4, "no.img");
    let odd = image(&site, "odd.img", MIB + 7);
    let done = protect(&site, "g2", &[&format!("d={odd}")], &[]);
    assert!([2, 5].contains(&done.code()), "odd size: {}\n{}", done.code(), done.err());
    let code = done.code();
    refused(&site, "g2", done, code, "odd.img");
    let empty = image(&site, "empty.img", 0);
    let done = protect(&site, "g3", &[&format!("d={empty}")], &[]);
    let code = done.code();
    assert_ne!(code, 0);
    refused(&site, "g3", done, code, "empty.img");
    // One good disk beside a bad one: neither is protected.
    let good = image(&site, "good.img", MIB);
    let pairs = [format!("a={good}"), format!("b={missing}")];
    let pairs: Vec<&str> = pairs.iter().map(String::as_str).collect();
    refused(&site, "g4", protect(&site, "g4", &pairs, &[]), 4, "no.img");
    // A loop device's backing file is in use.
    if rustix::process::geteuid().is_root() {
        let busy = image(&site, "busy.img", MIB);
        let device = tool("losetup", &["-f", "--show", &busy]).ok().out();
        let done = protect(&site, "g5", &[&format!("d={busy}")], &[]);
        tool("losetup", &["-d", device.trim()]).ok();
        refused(&site, "g5", done, 11, "busy.img");
    }
    // The same file again, in another group or twice in one.
    site.protect("g6", &[("d", Path::new(&good))], &["--journal-size", "64MiB"]);
    refused(&site, "g7", protect(&site, "g7", &[&format!("d={good}")], &[]), 11, "good.img");
    protect(&site, "g6", &[&format!("d={missing}")], &[]).fails_with(11);
    let uri = site.at_agent(&["disk", "uri", "g6.d"]).ok().json();
    assert!(uri["uri"].as_str().unwrap().starts_with("nbd+unix:"), "still served: {uri}");
}

#[test]
fn a_full_disk_and_an_unwritable_folder_leave_nothing_behind() {
    let site = Site::start("full");
    let disk = image(&site, "d.img", MIB);
    let pair = format!("d={disk}");
    if rustix::process::geteuid().is_root() {
        let small = site.path("small");
        std::fs::create_dir(&small).unwrap();
        let place = small.display().to_string();
        tool("mount", &["-t", "tmpfs", "-o", "size=20m", "none", &place]).ok();
        let journal = small.join("journal").display().to_string();
        let done = protect(&site, "g", &[&pair], &["--journal", &journal]);
        let left = Path::new(&journal).exists();
        tool("umount", &[&place]).ok();
        assert!(!left, "a journal was left on the full disk");
        let code = done.code();
        assert_ne!(code, 0, "64 MiB do not fit into 20");
        refused(&site, "g", done, code, "journal");
    }
    let nowhere = site.path("nowhere/at/all/journal").display().to_string();
    let done = protect(&site, "g", &[&pair], &["--journal", &nowhere]);
    let code = done.code();
    assert_ne!(code, 0);
    refused(&site, "g", done, code, "nowhere");
    // A journal that is too small to be one.
    let done = protect(&site, "g", &[&pair], &["--journal-size", "1MiB"]);
    let code = done.code();
    assert_ne!(code, 0);
    refused(&site, "g", done, code, "journal");
    // And afterwards it works.
    site.protect("g", &[("d", Path::new(&disk))], &["--journal-size", "64MiB"]);
    site.wait_protected("g");
}

#[test]
fn a_state_directory_that_cannot_be_written_is_refused() {
    let site = Site::empty("unwritable");
    let file = site.path("a-file");
    std::fs::write(&file, b"x").unwrap();
    let inside = file.join("t").display().to_string();
    let done = site_free(&["target", "init", "--dir", &inside, "--json"]);
    assert_ne!(done.code(), 0);
    assert_eq!(done.json_error()["type"], "error");
    // Twice in one folder.
    site.init_target();
    site.at_target(&["target", "init", "--listen", &site.listen]).fails_with(11);
    // Commands that need what is not there.
    assert_eq!(site.at_agent(&["status"]).code(), 4);
    assert_eq!(site.at_target(&["status"]).code(), 7, "the target does not run");
}

fn site_free(arguments: &[&str]) -> Done {
    e2e::run::cli(arguments)
}

#[test]
fn tokens_work_once_and_for_their_time_and_only_with_their_target() {
    let mut site = Site::empty("tokens");
    let token = site.init_target();
    site.start_target();
    site.join(&token).ok();
    let again = site.path("again").display().to_string();
    let join = |token: &str| site_free(&["join", token, "--dir", &again, "--json"]);
    let used = join(&token).fails_with(6);
    assert!(used.err().contains("used"), "{}", used.err());
    assert_eq!(join("sf1.bm90IGEgdG9rZW4").code(), 6, "rubbish");
    let expired = site.at_target(&["token", "create", "--ttl", "1s"]).ok().json();
    let expired = expired["token"].as_str().unwrap().to_owned();
    let life = Deadline::after(Duration::from_millis(2500));
    wait_until("the token's end", Duration::from_secs(20), || life.passed().then_some(()));
    let late = join(&expired).fails_with(6);
    assert!(late.err().contains("expired"), "{}", late.err());
    // Another authority under the same address is not believed.
    let fresh =
        site.at_target(&["token", "create"]).ok().json()["token"].as_str().unwrap().to_owned();
    site.target = None;
    std::fs::remove_dir_all(site.target_dir()).unwrap();
    site.init_target();
    site.start_target();
    let foreign = join(&fresh);
    assert_eq!(foreign.code(), 6, "a foreign authority: {}", foreign.err());
    assert!(!Path::new(&again).join("agent.json").exists(), "nothing is half joined");
}

#[test]
fn a_second_agent_target_or_server_of_the_same_thing_is_refused() {
    let site = Site::start("second");
    site.at_agent(&["agent", "run"]).fails_with(11);
    site.at_target(&["target", "run"]).fails_with(11);
    let disk = image(&site, "d.img", MIB);
    let socket = format!("unix:{}", site.path("s1").display());
    let mut serve = Command::new(standfast());
    serve.args(["serve", &disk, "--nbd", &socket, "--json"]);
    let mut first = Daemon::start(serve, &site.path("serve.log"));
    let other = format!("unix:{}", site.path("s2").display());
    let second = site_free(&["serve", &disk, "--nbd", &other, "--json"]).fails_with(11);
    assert!(second.json_error().to_string().contains("d.img"));
    protect(&site, "g", &[&format!("d={disk}")], &[]).fails_with(11);
    assert_eq!(first.stop(), 0);
    site.protect("g", &[("d", Path::new(&disk))], &["--journal-size", "64MiB"]);
    site_free(&["serve", &disk, "--nbd", &other, "--json"]).fails_with(11);
    site_free(&["serve", &site.path("none").display().to_string(), "--json"]).fails_with(4);
}

#[test]
fn a_damaged_or_foreign_journal_is_never_replayed() {
    let mut site = Site::start("journal");
    let disks: Vec<String> = ["x", "y"].iter().map(|n| image(&site, n, MIB)).collect();
    for (group, disk) in [("gx", &disks[0]), ("gy", &disks[1])] {
        site.protect(group, &[("d", Path::new(disk))], &["--journal-size", "64MiB"]);
        site.wait_protected(group);
    }
    let groups = site.agent_dir().join("groups");
    let journal = |group: &str| groups.join(group).join("journal");
    let filters = ["gx", "gy"].map(|group| site.wait_pid("filter", group, None));
    site.agent = None;
    filters.iter().for_each(|pid| kill_and_wait(*pid));
    let before = std::fs::read(&disks[0]).unwrap();
    // gy's journal in gx's place; the arena would hide it, so it goes too, as after a power cut.
    let own = site.path("own-journal");
    std::fs::rename(journal("gx"), &own).unwrap();
    std::fs::copy(journal("gy"), journal("gx")).unwrap();
    remove_arena(&site, "gx");
    let done = run_filter(&site, "gx");
    assert_ne!(done.code(), 0);
    assert!(done.err().contains("another group"), "{}", done.err());
    // Both super blocks damaged.
    std::fs::rename(&own, journal("gx")).unwrap();
    let file = File::options().write(true).open(journal("gx")).unwrap();
    let mut kept = vec![0; 4096];
    File::open(journal("gx")).unwrap().read_exact_at(&mut kept, 0).unwrap();
    for at in [100, MIB + 100] {
        file.write_all_at(&[0xff; 64], at).unwrap();
    }
    let done = run_filter(&site, "gx");
    assert_ne!(done.code(), 0);
    assert!(done.err().to_lowercase().contains("super"), "{}", done.err());
    let inspect =
        site_free(&["inspect", "journal", &journal("gx").display().to_string(), "--json"]);
    assert_ne!(inspect.code(), 0, "inspect tells, too: {}", inspect.out());
    assert!(std::fs::read(&disks[0]).unwrap() == before, "the disk is as it was");
    // One good copy is enough.
    file.write_all_at(&kept, 0).unwrap();
    site.start_agent();
    site.wait_protected("gx");
    site.wait_protected("gy");
}

fn remove_arena(site: &Site, group: &str) {
    let group: blockfilter::names::Name = group.parse().unwrap();
    let paths = blockfilter::config::GroupPaths::new(&site.agent_dir(), &group);
    let files = blockfilter::engine::real::RealFiles;
    let config = blockfilter::config::GroupConfig::load(&files, &paths).unwrap();
    let _ = std::fs::remove_file(config.arena_path());
}

fn run_filter(site: &Site, group: &str) -> Done {
    let mut command = Command::new(standfast());
    command.args(["run-filter", group, "--json", "--dir"]).arg(site.agent_dir());
    finish(command, Duration::from_secs(90))
}

#[test]
fn a_store_of_a_newer_version_is_refused_and_left_alone() {
    let mut site = Site::start("newer");
    let disk = image(&site, "d.img", MIB);
    site.protect("g", &[("d", Path::new(&disk))], &["--journal-size", "64MiB"]);
    site.wait_protected("g");
    site.target = None;
    let versioned = newer_manifest(&site.target_dir().join("groups").join("g"));
    let done = site.at_target(&["target", "run"]);
    // Either the target refuses to run, or it runs and refuses the group.
    assert_eq!(done.code(), 5, "{}\n{}", done.out(), done.err());
    assert!(done.err().contains("newer") || done.err().contains("version"), "{}", done.err());
    assert!(versioned.exists(), "nothing was deleted");
}

#[test]
fn what_moves_frames_has_its_settings_of_the_c_library_and_its_name() {
    let site = Site::start("settings");
    let disk = image(&site, "d.img", MIB);
    site.protect("g", &[("d", Path::new(&disk))], &["--journal-size", "64MiB"]);
    site.wait_protected("g");
    let replicator = site.wait_pid("replicator", "g", None);
    for pid in [replicator, site.target.as_ref().unwrap().pid()] {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
        let set = read("environ").split('\0').any(|v| v.starts_with("GLIBC_TUNABLES=glibc.malloc"));
        assert_eq!(set, cfg!(target_env = "gnu"));
        assert_eq!(read("comm").trim(), "standfast");
    }
}

/// Makes the current manifest say that a later version wrote it.
fn newer_manifest(group: &Path) -> std::path::PathBuf {
    let name = std::fs::read_to_string(group.join("CURRENT")).unwrap();
    let path = group.join(name.trim());
    let text = std::fs::read_to_string(&path).unwrap();
    let (head, body) = text.split_once('\n').unwrap();
    let words: Vec<&str> = head.split(' ').collect();
    let newer = format!("{} 99 {}\n{body}", words[0], words[2]);
    std::fs::write(&path, newer).unwrap();
    path
}
