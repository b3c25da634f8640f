//! Other people's NBD clients against both of our servers as they are shipped:
//! `standfast serve`, and a protected disk (the filter's own event loop).

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use e2e::Rng;
use e2e::filter::FilterOnly;
use e2e::process::Daemon;
use e2e::run::{Done, finish, require, standfast, tool};

/// A disk of 64 MiB served by one of our servers; what it holds is stamped.
struct Served {
    uri: String,
    folder: PathBuf,
    _serve: Option<Daemon>,
    _filter: Option<FilterOnly>,
    _temporary: Option<tempfile::TempDir>,
}

const SIZE: u64 = 64 << 20;

fn plain() -> Served {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().to_owned();
    let image = folder.join("disk.img");
    e2e::site::write_image(&image, 0, SIZE);
    let mut command = Command::new(standfast());
    command.arg("serve").arg(&image).arg("--json");
    command.args(["--name", "g.d0", "--nbd"]).arg(format!("unix:{}", folder.join("s").display()));
    let serve = Daemon::start(command, &folder.join("serve.log"));
    let uri = serve.ready["uri"].as_str().unwrap().to_owned();
    Served { uri, folder, _serve: Some(serve), _filter: None, _temporary: Some(temporary) }
}

fn protected() -> Served {
    let mut filter = FilterOnly::new("clients", 1, SIZE, 66);
    filter.start();
    let uri = filter.uris().remove(0);
    let folder = filter.folder().to_owned();
    Served { uri, folder, _serve: None, _filter: Some(filter), _temporary: None }
}

fn both(check: impl Fn(&Served)) {
    for make in [plain, protected] {
        check(&make());
    }
}

#[test]
fn nbdinfo_finds_what_a_client_needs() {
    both(|served| {
        let json = tool("nbdinfo", &["--json", &served.uri]).ok().json();
        let export = &json["exports"][0];
        assert_eq!(json["structured"], true, "{json}");
        assert_eq!(export["export-size"], SIZE, "{json}");
        assert_eq!(export["is_read_only"], false, "{json}");
        for can in [
            "can_multi_conn",
            "can_flush",
            "can_fua",
            "can_trim",
            "can_zero",
            "can_cache",
            "can_df",
        ] {
            assert_eq!(export[can], true, "{can}: {json}");
        }
        assert_eq!(export["block_size_maximum"], 32 << 20, "{json}");
        assert_eq!(export["contexts"][0], "base:allocation", "{json}");
        let list = tool("nbdinfo", &["--list", "--json", &served.uri]).ok().json();
        assert_eq!(list["exports"].as_array().unwrap().len(), 1, "{list}");
        let map = tool("nbdinfo", &["--map", "--json", &served.uri]).ok().json();
        let extents = map.as_array().unwrap();
        let total: u64 = extents.iter().map(|e| e["length"].as_u64().unwrap()).sum();
        assert_eq!(total, SIZE, "{map}");
        let unknown = served.uri.replace("g.d0", "nobody");
        assert_ne!(tool("nbdinfo", &[&unknown]).code(), 0, "an unknown export is refused");
    });
}

#[test]
fn nbdcopy_and_qemu_img_copy_in_and_out() {
    require(&["qemu-img"]);
    both(|served| {
        let image = served.folder.join("source.img");
        random_image(&image, 11);
        let name = image.display().to_string();
        tool("nbdcopy", &["--connections=4", "--flush", &name, &served.uri]).ok();
        let back = served.folder.join("back.img").display().to_string();
        tool("nbdcopy", &["--connections=4", "--requests=16", &served.uri, &back]).ok();
        assert!(std::fs::read(&name).unwrap() == std::fs::read(&back).unwrap(), "nbdcopy");
        random_image(&image, 12);
        tool("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &name, &served.uri]).ok();
        tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", &name, &served.uri]).ok();
        let info = tool("qemu-img", &["info", "--output=json", &served.uri]).ok().json();
        assert_eq!(info["virtual-size"], SIZE, "{info}");
    });
}

/// Data, zeroes and holes in pieces of random length.
fn random_image(path: &Path, seed: u64) {
    let mut rng = Rng::new(seed);
    let file = File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    let mut at = 0;
    while at < SIZE {
        let len = (512 * (1 + rng.below(2000))).min(SIZE - at);
        match rng.below(3) {
            0 => {}
            1 => file.write_all_at(&vec![0; len as usize], at).unwrap(),
            _ => {
                let data: Vec<u8> =
                    (0..len / 8).flat_map(|_| rng.next_u64().to_le_bytes()).collect();
                file.write_all_at(&data, at).unwrap();
            }
        }
        at += len;
    }
}

#[test]
fn nbdsh_flags_ranges_and_errors_are_as_the_protocol_says() {
    both(|served| {
        let mut nbdsh = Command::new("nbdsh");
        // The bindings are the system's, whatever python comes first in PATH.
        nbdsh.env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin");
        nbdsh.args(["--base-allocation", "-u", &served.uri, "-c", SCRIPT]);
        finish(nbdsh, Duration::from_secs(60)).ok();
    });
}

const SCRIPT: &str = r#"
def fails(code, act, *args):
    try:
        act(*args)
    except nbd.Error as e:
        assert e.errno == code, (e.errno, code)
        return
    assert False, "no error"
h.set_strict_mode(0)
for size in (1, 511, 512, 513, 4096, 65536, 262145, 1 << 20, 32 << 20):
    data = bytes([size % 251 + 1]) * size
    h.pwrite(data, 3, nbd.CMD_FLAG_FUA)
    assert h.pread(size, 3) == data, size
for flags in (0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA):
    h.pwrite(b"x" * 8192, 0)
    h.zero(4096, 1000, flags)
    assert h.pread(8192, 0) == b"x" * 1000 + bytes(4096) + b"x" * 3096
h.pwrite(b"x" * 8192, 0)
h.trim(5000, 1, nbd.CMD_FLAG_FUA)
assert h.pread(8192, 0) == b"x" + bytes(5000) + b"x" * 3191
h.zero(40 << 20, 8 << 20)
assert h.pread(32 << 20, 12 << 20) == bytes(32 << 20)
h.cache(8192, 0)
h.flush()
for act in (lambda: h.pread(0, 0), lambda: h.pwrite(b"", 0), lambda: h.trim(0, 0),
            lambda: h.zero(0, 0)):
    act()
size = h.get_size()
fails("ENOSPC", h.pwrite, b"y" * 4096, size - 1)
fails("ENOSPC", h.pwrite, b"y" * 300000, size + 1)
fails("EINVAL", h.pread, 2, size - 1)
fails("ENOSPC", h.trim, 2, size - 1)
fails("ENOSPC", h.zero, 2, size - 1)
fails("EINVAL", h.pread, 512, 0, 1 << 9)
assert h.pread(1, 0) == b"x"
extents = []
def cb(context, offset, entries, err):
    extents.extend(entries)
h.pwrite(b"d" * (1 << 20), 0)
h.zero(1 << 20, 1 << 20)
h.block_status(2 << 20, 0, cb)
assert sum(extents[::2]) == 2 << 20, extents
assert extents[1] & 2 == 0, "data just written is not a hole"
pieces = []
h.pread_structured(2 << 20, 0, lambda buf, off, s, err: pieces.append((off, len(buf), s)))
assert sum(p[1] for p in pieces) == 2 << 20, pieces
cookies = []
for i in range(200):
    buf = nbd.Buffer.from_bytearray(bytearray([i]) * 4096)
    cookies.append(h.aio_pwrite(buf, i * 4096))
for cookie in cookies:
    while not h.aio_command_completed(cookie):
        h.poll(-1)
for i in range(200):
    assert h.pread(4096, i * 4096) == bytes([i]) * 4096
# A flush on one connection covers what another one wrote; all see the same.
o = nbd.NBD()
o.connect_uri(h.get_uri())
h.pwrite(b"m" * 512, 5 << 20)
assert o.pread(512, 5 << 20) == b"m" * 512
o.flush()
o.shutdown()
h.shutdown()
"#;

#[test]
fn qemu_io_patterns_are_read_back() {
    require(&["qemu-io"]);
    both(|served| {
        let commands = [
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
        ];
        let mut arguments = vec!["-f", "raw"];
        arguments.extend(commands.iter().flat_map(|c| ["-c", *c]));
        arguments.push(&served.uri);
        let done: Done = tool("qemu-io", &arguments).ok();
        let text = done.out() + &done.err();
        assert!(!text.contains("failed") && !text.contains("error"), "{text}");
    });
}

#[test]
fn fio_verifies_over_one_and_four_connections() {
    require(&["fio"]);
    both(|served| {
        for jobs in [1_u64, 4] {
            let size = SIZE / jobs;
            let mut fio = Command::new("fio");
            fio.current_dir(&served.folder).args([
                "--name=v",
                "--ioengine=nbd",
                "--rw=randwrite",
                "--bsrange=512-128k",
                "--bs_unaligned",
                "--iodepth=16",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--verify_backlog=64",
                "--fsync=32",
                "--verify_state_save=0",
                "--randseed=7",
            ]);
            fio.arg(format!("--uri={}", served.uri));
            fio.arg(format!("--io_size={}", (24 << 20) / jobs));
            fio.arg(format!("--size={size}")).arg(format!("--offset_increment={size}"));
            fio.arg(format!("--numjobs={jobs}"));
            finish(fio, Duration::from_secs(120)).ok();
        }
    });
}

#[test]
fn the_nbd_crates_client_agrees_with_the_filters_server() {
    use std::io::{Read, Seek, SeekFrom, Write};
    let mut filter = FilterOnly::new("crate", 1, 1 << 20, 6);
    filter.start();
    let mut stream = std::os::unix::net::UnixStream::connect(filter.paths.nbd_socket()).unwrap();
    let export = nbd::client::handshake(&mut stream, b"g.d0").unwrap();
    assert_eq!(export.size, 1 << 20);
    let mut client = nbd::client::NbdClient::new(&mut stream, &export);
    client.write_all(b"second implementation").unwrap();
    client.seek(SeekFrom::Start(7)).unwrap();
    let mut back = [0; 14];
    client.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"implementation");
}
