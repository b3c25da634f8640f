//! Other people's clients against our server.
#![allow(clippy::unwrap_used, reason = "tests")]

#[allow(unreachable_pub, dead_code, reason = "shared by several test programs")]
mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use blockfilter::engine::real::RealClock;
use blockfilter::nbd::file::FileExport;
use blockfilter::nbd::listen::{Listener, inherited};
use blockfilter::nbd::server::{FixedExports, ServerConfig, ServerHandle};
use common::{Served, noise, run, run_any, write};

#[test]
fn nbdinfo_sees_everything_that_is_offered() {
    let mut served = Served::new((8 << 20) + 17);
    let text = run("nbdinfo", &["--json", &served.uri()]);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["protocol"], "newstyle-fixed");
    assert_eq!(json["structured"], true);
    let export = &json["exports"][0];
    assert_eq!(export["export-name"], "disk");
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]), "a plain file");
    assert_eq!(export["export-size"], (8 << 20) + 17);
    assert_eq!(export["block_size_maximum"], 32 << 20);
    for flag in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_df"] {
        assert_eq!(export[flag], true, "{flag}");
    }
    for flag in ["can_cache", "can_fast_zero"] {
        assert_eq!(export[flag], true, "{flag}");
    }
    let list = run("nbdinfo", &["--list", "--json", &format!("nbd://{}", served.tcp())]);
    assert!(list.contains("\"disk\""), "{list}");
    // An empty name is the only export.
    assert_eq!(run("nbdinfo", &["--size", &format!("nbd://{}", served.tcp())]), "8388625\n");
    served.start(true, ServerConfig::default());
    let text = run("nbdinfo", &["--json", &served.uri()]);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["exports"][0]["is_read_only"], true);
    let (ok, text) = run_any("nbdinfo", &[&served.uri().replace("/disk", "/other")]);
    assert!(!ok && text.contains("other"), "{text}");
}

#[test]
fn nbdinfo_maps_data_and_holes() {
    let served = Served::new(4 << 20);
    let pattern = "write -P 1 1M 64k";
    run("qemu-io", &["-f", "raw", "-c", pattern, &served.uri()]);
    let text = run("nbdinfo", &["--map", "--json", &served.uri()]);
    let map: serde_json::Value = serde_json::from_str(&text).unwrap();
    let rows: Vec<(u64, u64, u64)> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|e| {
            let number = |key| e[key].as_u64().unwrap();
            (number("offset"), number("length"), number("type"))
        })
        .collect();
    let data = 1 << 20;
    assert_eq!(rows, [(0, data, 3), (data, 65_536, 0), (data + 65_536, 3 * data - 65_536, 3)]);
}

#[test]
fn nbdcopy_there_and_back_is_the_same() {
    let served = Served::new(24 << 20);
    let (from, to) = (served.dir.path().join("from"), served.dir.path().join("to"));
    let mut data = noise(24 << 20, 7);
    data[5 << 20..11 << 20].fill(0);
    write(&from, &data);
    run("nbdcopy", &["--flush", from.to_str().unwrap(), &served.uri()]);
    run("nbdcopy", &[&served.uri(), to.to_str().unwrap()]);
    assert!(std::fs::read(&to).unwrap() == data);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", from.to_str().unwrap(), &served.uri()]);
    // Over TCP, with requests of 32 MiB split by the client's own limits.
    let tcp = format!("nbd://{}/disk", served.tcp());
    let args = ["--request-size=8388608", "--connections=2", &tcp, to.to_str().unwrap()];
    run("nbdcopy", &args);
    assert!(std::fs::read(&to).unwrap() == data);
}

#[test]
fn nbdsh_commands_flags_and_errors_are_as_the_protocol_says() {
    let served = Served::new(33 << 20);
    run("nbdsh", &["--base-allocation", "-u", &served.uri(), "-c", FLAGS_AND_ERRORS]);
}

const FLAGS_AND_ERRORS: &str = r#"
def fails(code, act, *args, **kw):
    try:
        act(*args, **kw)
    except nbd.Error as e:
        assert e.errno == code, (e.errno, code)
        return
    assert False, "no error"
h.set_strict_mode(0)
# Written and read back, with FUA, in all sizes up to the largest payload.
for size in (1, 511, 512, 4096, 65536, 262144, 262145, 1 << 20, 32 << 20):
    data = bytes([size % 251 + 1]) * size
    h.pwrite(data, 3, nbd.CMD_FLAG_FUA)
    assert h.pread(size, 3) == data, size
# Zeroes of all kinds.
for flags in (0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_FUA):
    h.pwrite(b"x" * 8192, 0)
    h.zero(4096, 1000, flags)
    assert h.pread(8192, 0) == b"x" * 1000 + bytes(4096) + b"x" * 3096
h.pwrite(b"x" * 8192, 0)
h.trim(5000, 1, nbd.CMD_FLAG_FUA)
assert h.pread(8192, 0) == b"x" + bytes(5000) + b"x" * 3191
h.cache(8192, 0)
h.flush()
# A zero length never disconnects.
for act in (lambda: h.pread(0, 0), lambda: h.pwrite(b"", 0), lambda: h.trim(0, 0),
            lambda: h.zero(0, 0), lambda: h.cache(0, 0)):
    act()
# Out of range: the payload is drained and the connection lives.
size = h.get_size()
fails("ENOSPC", h.pwrite, b"y" * 4096, size - 1)
fails("ENOSPC", h.pwrite, b"y" * 300000, size + 1)
fails("EINVAL", h.pread, 2, size - 1)
fails("ENOSPC", h.trim, 2, size - 1)
fails("ENOSPC", h.zero, 2, size - 1)
fails("EINVAL", h.pread, 4096, (1 << 63))
# Unknown flags.
fails("EINVAL", h.pread, 512, 0, 1 << 9)
assert h.pread(1, 0) == b"x"
# Structured reads.
got = []
h.pread_structured(4096, 0, lambda buf, off, s, err: got.append((off, len(buf), s)),
                   nbd.CMD_FLAG_DF)
assert got == [(0, 4096, nbd.READ_DATA)], got
# Allocation.
extents = []
def cb(context, offset, entries, err):
    assert context == nbd.CONTEXT_BASE_ALLOCATION
    extents.extend(entries)
h.block_status(1 << 20, 0, cb)
assert sum(extents[::2]) == 1 << 20, extents
extents.clear()
h.block_status(1 << 20, 0, cb, nbd.CMD_FLAG_REQ_ONE)
assert len(extents) == 2 and extents[0] <= 1 << 20, extents
# Many at once.
cookies = []
for i in range(64):
    buf = nbd.Buffer.from_bytearray(bytearray([i]) * 4096)
    cookies.append(h.aio_pwrite(buf, i * 4096))
for cookie in cookies:
    while not h.aio_command_completed(cookie):
        h.poll(-1)
for i in range(64):
    assert h.pread(4096, i * 4096) == bytes([i]) * 4096
h.shutdown()
"#;

#[test]
fn nbdsh_may_leave_out_everything_that_is_negotiable() {
    let served = Served::new(1 << 20);
    let socket = served.socket();
    let script = format!(
        r#"
def connect(prepare):
    h = nbd.NBD()
    prepare(h)
    h.set_export_name("disk")
    h.connect_unix("{}")
    h.set_strict_mode(0)
    h.pwrite(b"a" * 5000, 7)
    assert h.pread(5000, 7) == b"a" * 5000
    try:
        h.pread(10, 1 << 20)
        assert False
    except nbd.Error:
        pass
    h.shutdown()
connect(lambda h: h.set_request_structured_replies(False))
connect(lambda h: h.set_handshake_flags(0))
connect(lambda h: h.set_handshake_flags(nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE))
connect(lambda h: h.set_request_meta_context(False)) if hasattr(nbd.NBD, "set_request_meta_context") else None
connect(lambda h: h.set_request_block_size(False)) if hasattr(nbd.NBD, "set_request_block_size") else None
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_unix("{}")
h.set_export_name("n" * 4096)
try:
    h.opt_info()
    assert False
except nbd.Error:
    pass
names = []
h.opt_list(lambda name, description: names.append(name))
assert names == ["disk"]
h.set_export_name("disk")
h.opt_info()
assert h.get_size() == 1 << 20
h.opt_abort()
"#,
        socket.display(),
        socket.display()
    );
    run("nbdsh", &["-c", &script]);
}

#[test]
fn qemu_io_patterns_are_read_back() {
    let served = Served::new(64 << 20);
    let mut args = vec!["-f".to_owned(), "raw".to_owned()];
    for command in [
        "write -P 0xaa 0 1M",
        "write -f -P 0xbb 4096 4096",
        "write -z 8192 8192",
        "write -z -u 1M 1M",
        "discard 512k 64k",
        "aio_write -P 0xcc 10M 2M",
        "aio_write -P 0xdd 20M 64k",
        "aio_flush",
        "flush",
        "read -P 0xaa 0 4096",
        "read -P 0xbb 4096 4096",
        "read -P 0 8192 8192",
        "read -P 0xaa 16384 507904",
        "read -P 0 512k 64k",
        "read -P 0xcc 10M 2M",
        "read -P 0xdd 20M 64k",
        "read -P 0 40M 24M",
    ] {
        args.extend(["-c".to_owned(), command.to_owned()]);
    }
    args.push(served.uri());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let text = run("qemu-io", &args);
    assert!(!text.contains("failed") && !text.contains("error"), "{text}");
}

#[test]
fn fio_verifies_over_one_and_four_connections() {
    let served = Served::new(64 << 20);
    for jobs in [1u64, 4] {
        let size = (64 << 20) / jobs;
        run(
            "fio",
            &[
                "--name=v",
                "--ioengine=nbd",
                &format!("--uri={}", served.uri()),
                "--rw=randwrite",
                "--bsrange=512-128k",
                "--bs_unaligned",
                "--iodepth=16",
                "--verify=crc32c",
                "--verify_backlog=64",
                "--fsync=32",
                "--io_size=24m",
                &format!("--size={size}"),
                &format!("--offset_increment={size}"),
                &format!("--numjobs={jobs}"),
                "--randseed=7",
                "--verify_state_save=0",
            ],
        );
    }
}

#[test]
fn the_nbd_crates_client_agrees_with_our_handshake() {
    let served = Served::new(1 << 20);
    let mut stream = TcpStream::connect(served.tcp()).unwrap();
    let export = nbd::client::handshake(&mut stream, b"disk").unwrap();
    assert_eq!(export.size, 1 << 20);
    let mut client = nbd::client::NbdClient::new(&mut stream, &export);
    client.write_all(b"second implementation").unwrap();
    use std::io::{Seek, SeekFrom};
    client.seek(SeekFrom::Start(7)).unwrap();
    let mut back = [0; 14];
    client.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"implementation");
}

fn short_timeouts() -> ServerConfig {
    ServerConfig {
        handshake_timeout: Duration::from_millis(200),
        stall_timeout: Duration::from_millis(300),
        connections_max: 8,
        half_open_max: 3,
        ..ServerConfig::default()
    }
}

/// Whether the server closes within ten seconds, whatever it says before.
fn closes(mut stream: UnixStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut sink = Vec::new();
    match stream.read_to_end(&mut sink) {
        Ok(_) => true,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn silent_and_half_open_clients_are_closed_and_others_still_served() {
    let mut served = Served::new(1 << 20);
    served.start(false, short_timeouts());
    let silent: Vec<UnixStream> =
        (0..6).map(|_| UnixStream::connect(served.socket()).unwrap()).collect();
    assert!(silent.into_iter().all(closes));
    run("nbdinfo", &[&served.uri()]);
}

/// Bytes that keep coming renew nothing: the time is for the whole handshake.
#[test]
fn a_client_that_keeps_asking_in_its_handshake_is_closed() {
    let mut served = Served::new(1 << 20);
    served.start(false, short_timeouts());
    let mut stream = UnixStream::connect(served.socket()).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    let mut answers = vec![0; 4096];
    // Fewer options than a handshake may have, at most fifty a second.
    let closed = (0..200).any(|_| {
        let asked = stream.write_all(b"IHAVEOPT\0\0\0\x03\0\0\0\0");
        let ended = loop {
            match stream.read(&mut answers) {
                Ok(0) => break true,
                Ok(_) => {}
                Err(error) => break error.kind() != std::io::ErrorKind::WouldBlock,
            }
        };
        asked.is_err() || ended
    });
    assert!(closed, "still open after four seconds of a handshake of 0.2");
}

#[test]
fn a_stalled_payload_closes_and_writes_nothing() {
    let mut served = Served::new(1 << 20);
    served.start(false, short_timeouts());
    for (len, sent) in [(4096u32, 100usize), (600_000, 300_000), (4096, 0)] {
        let mut stream = UnixStream::connect(served.socket()).unwrap();
        let mut hello = Vec::from([0, 0, 0, 3]);
        hello.extend(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk");
        hello.extend([0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1]);
        hello.extend([0; 16]);
        hello.extend(len.to_be_bytes());
        hello.extend(vec![b'x'; sent]);
        stream.write_all(&hello).unwrap();
        assert!(closes(stream), "{len} {sent}");
    }
    let mut file = std::fs::read(served.file()).unwrap();
    file.retain(|b| *b != 0);
    assert!(file.is_empty());
}

#[test]
fn rubbish_closes_only_its_own_connection() {
    let served = Served::new(1 << 20);
    for seed in 0..50 {
        let mut stream = UnixStream::connect(served.socket()).unwrap();
        let mut bytes = noise(700, seed);
        bytes[..4].copy_from_slice(&[0, 0, 0, 3]);
        let _ = stream.write_all(&bytes);
        assert!(closes(stream));
    }
    run("nbdinfo", &[&served.uri()]);
}

#[test]
fn stop_answers_what_runs_and_closes_all() {
    let mut served = Served::new(1 << 20);
    let mut stream = TcpStream::connect(served.tcp()).unwrap();
    nbd::client::handshake(&mut stream, b"disk").unwrap();
    let server = served.server.as_mut().unwrap();
    assert_eq!(server.connections(), 1);
    server.stop();
    assert_eq!(server.connections(), 0);
    assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0);
    assert!(!served.socket().exists());
}

/// Not a test by itself: serves for [`libnbd_starts_us_by_socket_activation`].
#[test]
fn serve_for_another_process() {
    let Ok(path) = std::env::var("STANDFAST_TEST_SERVE") else { return };
    let listeners: Vec<Listener> =
        inherited().into_iter().map(|fd| Listener::from_fd(fd).unwrap()).collect();
    assert_eq!(listeners.len(), 1);
    assert!(inherited().is_empty(), "they can be taken once");
    let export = Arc::new(FileExport::open(path.as_ref(), false).unwrap());
    let exports = Arc::new(FixedExports(vec![("disk".to_owned(), export)]));
    let clock = Arc::new(RealClock::new());
    let config = ServerConfig::default();
    let _server = ServerHandle::start(listeners, config, exports, clock).unwrap();
    loop {
        // libnbd ends us by SIGTERM.
        std::thread::park();
    }
}

#[test]
fn libnbd_starts_us_by_socket_activation() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    write(&path, &[0; 65_536]);
    let us = std::env::current_exe().unwrap();
    let script = format!(
        r#"
import os
os.environ["STANDFAST_TEST_SERVE"] = "{}"
h = nbd.NBD()
h.connect_systemd_socket_activation(["{}", "serve_for_another_process", "--exact", "--nocapture"])
h.pwrite(b"activated", 100, nbd.CMD_FLAG_FUA)
assert h.pread(9, 100) == b"activated" and h.get_size() == 65536
h.shutdown()
"#,
        path.display(),
        us.display()
    );
    run("nbdsh", &["-c", &script]);
    assert_eq!(&std::fs::read(&path).unwrap()[100..109], b"activated");
}
