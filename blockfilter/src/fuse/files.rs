//! The kernel's requests on a folder of disks, as requests of NBD clients.
//!
//! Validated here: ranges against the disk's size, writes against read-only.
//! Answers are sent from the client's thread, so the two threads that read the
//! kernel's requests only ever wait for room. Errors are [`Errno`]'s numbers.

use std::ffi::OsStr;
use std::io;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};

use crate::block::{Errno, ZeroFlags, check_range};
use crate::nbd::client::{Answer, Client, Op};

/// One disk.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) name: String,
    /// In bytes; never changes.
    pub(super) size: u64,
    pub(super) read_only: bool,
    pub(super) client: Client,
}

/// The folder.
#[derive(Debug)]
pub(super) struct Disks {
    disks: Vec<Disk>,
    uid: u32,
    gid: u32,
}

impl Disks {
    pub(super) fn new(disks: Vec<Disk>) -> Self {
        let uid = rustix::process::geteuid().as_raw();
        let gid = rustix::process::getegid().as_raw();
        Self { disks, uid, gid }
    }

    fn disk(&self, ino: INodeNo) -> Option<&Disk> {
        let index = ino.0.checked_sub(FIRST_INO)?;
        self.disks.get(usize::try_from(index).ok()?)
    }

    fn attr(&self, ino: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match self.disk(ino) {
            Some(disk) if disk.read_only => (FileType::RegularFile, 0o400, disk.size),
            Some(disk) => (FileType::RegularFile, 0o600, disk.size),
            None if ino.0 == ROOT_INO => (FileType::Directory, 0o755, 0),
            None => return None,
        };
        Some(FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: if kind == FileType::Directory { 2 } else { 1 },
            uid: self.uid,
            gid: self.gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    /// The disk, if it can be written.
    fn writable(&self, ino: INodeNo) -> Result<&Disk, fuser::Errno> {
        match self.disk(ino) {
            None => Err(fuser::Errno::EBADF),
            Some(disk) if disk.read_only => Err(fuser::Errno::EROFS),
            Some(disk) => Ok(disk),
        }
    }
}

impl Filesystem for Disks {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // A kernel without one of these works too, only slower.
        for flag in [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_BIG_WRITES] {
            let _ = config.add_capabilities(flag);
        }
        let _ = config.set_max_write(REQUEST_MAX);
        let _ = config.set_max_background(BACKGROUND_MAX);
        let _ = config.set_congestion_threshold(BACKGROUND_MAX / 4 * 3);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.disks.iter().position(|d| OsStr::new(&d.name) == name);
        let index = found.filter(|_| parent.0 == ROOT_INO);
        match index.and_then(|i| self.attr(INodeNo(FIRST_INO + i as u64))) {
            Some(attr) => reply.entry(&TTL, &attr, Generation(0)),
            None => reply.error(fuser::Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(ino) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(fuser::Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        // Times are of no use here: setting them changes nothing and succeeds.
        match self.attr(ino) {
            None => reply.error(fuser::Errno::ENOENT),
            Some(_) if mode.is_some() || uid.is_some() || gid.is_some() => {
                reply.error(fuser::Errno::EPERM);
            }
            Some(attr) if size.is_some_and(|size| size != attr.size) => {
                reply.error(fuser::Errno::EPERM);
            }
            Some(attr) => reply.attr(&TTL, &attr),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let writes = flags.acc_mode() != OpenAccMode::O_RDONLY;
        let allowed = match self.disk(ino) {
            Some(_) if writes => self.writable(ino).map(|_| ()),
            Some(_) => Ok(()),
            None => Err(fuser::Errno::EISDIR),
        };
        let direct = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        match allowed {
            Ok(()) => reply.opened(FileHandle(0), direct | FopenFlags::FOPEN_NOFLUSH),
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(disk) = self.disk(ino) else { return reply.error(fuser::Errno::EBADF) };
        let len = disk.size.saturating_sub(offset).min(u64::from(size)) as u32;
        if len == 0 {
            return reply.data(&[]);
        }
        let answer = move |result| match result {
            Ok(Answer::Data(data)) => reply.data(&data),
            Ok(_) => reply.error(fuser::Errno::EIO),
            Err(errno) => reply.error(number(errno)),
        };
        disk.client.submit(Op::Read { offset, len }, Box::new(answer));
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let len = data.len() as u32;
        let disk = match self.writable(ino) {
            Ok(disk) => disk,
            Err(errno) => return reply.error(errno),
        };
        if let Err(errno) = check_range(offset, u64::from(len), disk.size, true) {
            return reply.error(number(errno));
        }
        if len == 0 {
            return reply.written(0);
        }
        let fua = flags.0 & O_DSYNC != 0;
        let answer = move |result: Result<Answer, Errno>| match result {
            Ok(_) => reply.written(len),
            Err(errno) => reply.error(number(errno)),
        };
        disk.client.submit(Op::Write { offset, data: data.into(), fua }, Box::new(answer));
    }

    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        match self.disk(ino) {
            Some(disk) if disk.read_only => reply.ok(),
            Some(disk) => submit_all(disk, vec![Op::Flush], reply),
            None => reply.error(fuser::Errno::EBADF),
        }
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let disk = match self.writable(ino) {
            Ok(disk) => disk,
            Err(errno) => return reply.error(errno),
        };
        let Some(end) = offset.checked_add(length) else {
            return reply.error(fuser::Errno::EFBIG);
        };
        let punch = mode == FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE;
        let zero = mode & !FALLOC_KEEP_SIZE == FALLOC_ZERO_RANGE;
        if !punch && !zero {
            return reply.error(fuser::Errno::EOPNOTSUPP);
        }
        if end > disk.size && mode & FALLOC_KEEP_SIZE == 0 {
            return reply.error(fuser::Errno::ENOSPC);
        }
        let (mut at, end) = (offset, end.min(disk.size));
        let mut ops = Vec::new();
        while at < end {
            let len = (end - at).min(PIECE) as u32;
            ops.push(if punch {
                Op::Trim { offset: at, len, fua: false }
            } else {
                let flags = ZeroFlags { no_hole: true, ..ZeroFlags::default() };
                Op::Zero { offset: at, len, flags }
            });
            at += u64::from(len);
        }
        submit_all(disk, ops, reply);
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if ino.0 != ROOT_INO {
            return reply.error(fuser::Errno::ENOTDIR);
        }
        let dots = [".", ".."].map(|name| (ROOT_INO, FileType::Directory, name));
        let files = self.disks.iter().zip(FIRST_INO..);
        let files = files.map(|(d, ino)| (ino, FileType::RegularFile, d.name.as_str()));
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        for (next, (ino, kind, name)) in (1..).zip(dots.into_iter().chain(files)).skip(skip) {
            if reply.add(INodeNo(ino), next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let bytes: u64 = self.disks.iter().map(|d| d.size).sum();
        reply.statfs(bytes.div_ceil(4096), 0, 0, self.disks.len() as u64, 0, 4096, 255, 4096);
    }
}

/// What a request of the kernel made of several of ours still waits for.
struct Gather {
    left: AtomicUsize,
    /// The first error's number, or 0.
    error: AtomicI32,
    reply: Mutex<Option<ReplyEmpty>>,
}

/// Sends all of `ops`, and answers when the last one is answered.
fn submit_all(disk: &Disk, ops: Vec<Op>, reply: ReplyEmpty) {
    if ops.is_empty() {
        return reply.ok();
    }
    let gather = Arc::new(Gather {
        left: AtomicUsize::new(ops.len()),
        error: AtomicI32::new(0),
        reply: Mutex::new(Some(reply)),
    });
    for op in ops {
        let gather = Arc::clone(&gather);
        let answer = move |result: Result<Answer, Errno>| {
            if let Err(errno) = result {
                gather.error.store(number(errno).code(), Ordering::SeqCst);
            }
            if gather.left.fetch_sub(1, Ordering::SeqCst) == 1 {
                let reply = gather.reply.lock().unwrap_or_else(PoisonError::into_inner).take();
                match (reply, gather.error.load(Ordering::SeqCst)) {
                    (Some(reply), 0) => reply.ok(),
                    (Some(reply), code) => reply.error(fuser::Errno::from_i32(code)),
                    (None, _) => {}
                }
            }
        };
        disk.client.submit(op, Box::new(answer));
    }
}

/// A client that ends while requests wait is a device that is gone: EIO.
fn number(errno: Errno) -> fuser::Errno {
    match errno {
        Errno::Shutdown => fuser::Errno::EIO,
        errno => fuser::Errno::from_i32(errno.code() as i32),
    }
}

const ROOT_INO: u64 = 1;
const FIRST_INO: u64 = 2;
/// Names and sizes never change.
const TTL: Duration = Duration::from_secs(86_400);
/// Largest read or write of the kernel, in bytes (its own limit by default).
const REQUEST_MAX: u32 = 1 << 20;
/// Requests of asynchronous direct I/O that the kernel sends at once.
const BACKGROUND_MAX: u16 = 128;
/// Longest request without payload, in bytes.
const PIECE: u64 = 1 << 30;
const FALLOC_KEEP_SIZE: i32 = 1;
const FALLOC_PUNCH_HOLE: i32 = 2;
const FALLOC_ZERO_RANGE: i32 = 0x10;
const O_DSYNC: i32 = 0o10_000;
