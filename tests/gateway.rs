//! `agent run --nbd`: protected disks over TCP, by other people's clients; and the
//! application's hooks of `point create --app`.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use e2e::process::Daemon;
use e2e::run::{require, standfast, tool};
use e2e::site::Site;
use e2e::wait::Deadline;

const MIB: u64 = 1 << 20;

/// Another agent takes over and serves on a port of its own.
fn serve(site: &mut Site, more: &[&str]) -> String {
    site.agent.take().unwrap().stop();
    let mut command = Command::new(standfast());
    command.args(["agent", "run", "--json", "--nbd", "127.0.0.1:0"]).args(more);
    command.arg("--dir").arg(site.agent_dir());
    let agent = Daemon::start(command, &site.path("agent.log"));
    let address = agent.ready["nbd"].as_str().unwrap().to_owned();
    site.agent = Some(agent);
    address
}

#[test]
fn the_gateway_serves_disks_over_tcp_and_with_tls_only_to_certificates() {
    require(&["nbdinfo", "nbdcopy"]);
    let mut site = Site::start("gateway");
    let disk = site.image("d.img", 0, 4 * MIB);
    site.protect("g", &[("d", &disk)], &["--journal-size", "64MiB"]);
    let address = serve(&mut site, &[]);
    let uri = format!("nbd://{address}/g.d");
    let info = tool("nbdinfo", &["--json", &uri]).ok().json();
    assert_eq!(info["exports"][0]["export-size"], 4 * MIB, "{info}");
    let back = site.path("back").display().to_string();
    tool("nbdcopy", &[&uri, &back]).ok();
    assert!(std::fs::read(&back).unwrap() == std::fs::read(&disk).unwrap());
    // The other way, then read on the group's own socket after an unprotect.
    let new = site.image("new.img", 1, 4 * MIB);
    tool("nbdcopy", &["--flush", &new.display().to_string(), &uri]).ok();
    assert_ne!(tool("nbdinfo", &[&format!("nbd://{address}/g.none")]).code(), 0);

    let tls = site.path("tls");
    std::fs::create_dir(&tls).unwrap();
    let pki = site.target_dir().join("pki");
    for (from, to) in [
        ("ca.pem", "ca-cert.pem"),
        ("server.pem", "server-cert.pem"),
        ("server.key", "server-key.pem"),
    ] {
        std::fs::copy(pki.join(from), tls.join(to)).unwrap();
    }
    let address = serve(&mut site, &["--tls", &tls.display().to_string()]);
    let own = site.path("alice").display().to_string();
    site.at_target(&["cert", "issue", "alice", "--out", &own]).ok();
    let none = site.path("nobody");
    std::fs::create_dir(&none).unwrap();
    std::fs::copy(tls.join("ca-cert.pem"), none.join("ca-cert.pem")).unwrap();
    let with = |folder: &str| format!("nbds://{address}/g.d?tls-certificates={folder}");
    tool("nbdcopy", &[&with(&own), &back]).ok();
    assert!(std::fs::read(&back).unwrap() == std::fs::read(&new).unwrap());
    assert_ne!(tool("nbdinfo", &[&with(&none.display().to_string())]).code(), 0);
    assert_ne!(tool("nbdinfo", &[&format!("nbd://{address}/g.d")]).code(), 0, "without TLS");
    site.at_agent(&["unprotect", "g"]).ok();
    assert!(std::fs::read(&disk).unwrap() == std::fs::read(&new).unwrap());
}

fn hook(site: &Site, name: &str, body: &str) {
    let folder = site.agent_dir().join("hooks");
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join(name);
    let log = site.path("hooks.log");
    let text =
        format!("#!/bin/sh\necho $STANDFAST_EVENT $STANDFAST_POINT >> {}\n{body}\n", log.display());
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_point_with_app_needs_a_freeze_that_succeeds_and_always_thaws() {
    let site = Site::start("hooks");
    let disk = site.image("d.img", 0, 4 * MIB);
    site.protect("g", &[("d", &disk)], &["--journal-size", "64MiB"]);
    site.wait_protected("g");
    let create = |tag: &str| site.at_agent(&["point", "create", "g", "--tag", tag, "--app"]);
    let tags = || -> Vec<String> {
        let points = site.points("g");
        points.iter().filter_map(|p| p["tag"].as_str().map(str::to_owned)).collect()
    };
    create("none").fails_with(4);
    hook(&site, "thaw", "");
    hook(&site, "freeze", "");
    create("good").ok();
    hook(&site, "freeze", "exit 3");
    create("failed").fails_with(1);
    hook(&site, "freeze", "exec sleep 600");
    let time = Deadline::after(Duration::from_secs(40));
    create("hangs").fails_with(1);
    assert!(!time.passed());
    assert_eq!(tags(), ["good"]);
    hook(&site, "freeze", "");
    hook(&site, "thaw", "exit 4");
    let late = create("thaw").fails_with(1);
    assert!(late.err().contains("thaw"), "{}", late.err());
    let log = std::fs::read_to_string(site.path("hooks.log")).unwrap();
    let each = |tag| format!("freeze {tag}\nthaw {tag}\n");
    assert_eq!(log, ["good", "failed", "hangs", "thaw"].map(each).concat());
}
