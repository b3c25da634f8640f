//! Sockets that NBD servers listen on: Unix, TCP, or inherited from systemd.
//!
//! A Unix socket whose server died is replaced; one whose server lives is
//! refused. Its file is of mode 0600 before anybody can connect.

#![expect(unsafe_code, reason = "an inherited descriptor is a number until it is owned")]

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::Mode;
use rustix::net::sockopt;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Where to listen: `HOST:PORT` or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket's path.
    Unix(PathBuf),
    /// Host and port.
    Tcp(String),
}

/// Not an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an address: use HOST:PORT or unix:PATH")]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let error = || AddressError(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(error()) } else { Ok(Self::Unix(path.into())) };
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(error)?;
        match (host.is_empty(), port.parse::<u16>()) {
            (false, Ok(_)) => Ok(Self::Tcp(text.to_owned())),
            _ => Err(error()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(text) => f.write_str(text),
        }
    }
}

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another server listens there.
    #[error("{0} is in use by another server; stop it or choose another address")]
    InUse(String),
    /// A file that is not a socket is in the way.
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// A system call failed.
    #[error("cannot listen on {address}: {source}")]
    Io {
        /// Where.
        address: String,
        /// Why it failed.
        source: io::Error,
    },
}

/// A listening socket; the file of a Unix socket made by [`Listener::bind`] is
/// removed on drop.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    _file: Option<SocketFile>,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A new connection.
#[derive(Debug)]
pub enum Accepted {
    /// By a Unix socket.
    Unix(UnixStream),
    /// By TCP, from there.
    Tcp(TcpStream, SocketAddr),
}

#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A file left behind is replaced by the next server.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Unix(listener) => listener.as_fd(),
            Socket::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Listener {
    /// Listens.
    pub fn bind(address: &Address) -> Result<Self, ListenError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => ListenError::InUse(address.to_string()),
            _ => ListenError::Io { address: address.to_string(), source },
        };
        match address {
            Address::Unix(path) => {
                make_way(path)?;
                let socket = bind_unix(path).map_err(failed)?;
                let file = Some(SocketFile(path.clone()));
                Ok(Self { socket: Socket::Unix(socket), _file: file })
            }
            Address::Tcp(text) => {
                let resolved: Vec<SocketAddr> = text.to_socket_addrs().map_err(failed)?.collect();
                let socket = TcpListener::bind(&resolved[..]).map_err(failed)?;
                Ok(Self { socket: Socket::Tcp(socket), _file: None })
            }
        }
    }

    /// Takes a listening socket that was opened by somebody else.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let invalid = |text| io::Error::new(io::ErrorKind::InvalidInput, text);
        if !sockopt::socket_acceptconn(&fd)? {
            return Err(invalid("the socket does not listen"));
        }
        let socket = match sockopt::socket_domain(&fd)? {
            AddressFamily::UNIX => Socket::Unix(fd.into()),
            AddressFamily::INET | AddressFamily::INET6 => Socket::Tcp(fd.into()),
            _ => return Err(invalid("the socket is neither Unix nor TCP")),
        };
        Ok(Self { socket, _file: None })
    }

    /// Where it listens; a port that was given as 0 is resolved.
    pub fn address(&self) -> io::Result<Address> {
        match &self.socket {
            Socket::Unix(listener) => {
                let address = listener.local_addr()?;
                Ok(Address::Unix(address.as_pathname().unwrap_or(Path::new("")).to_owned()))
            }
            Socket::Tcp(listener) => Ok(Address::Tcp(listener.local_addr()?.to_string())),
        }
    }

    /// Makes [`Listener::accept`] return `WouldBlock` when nobody is waiting.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        match &self.socket {
            Socket::Unix(listener) => listener.set_nonblocking(true),
            Socket::Tcp(listener) => listener.set_nonblocking(true),
        }
    }

    /// The next connection, tuned ([`tune`]).
    pub fn accept(&self) -> io::Result<Accepted> {
        match &self.socket {
            Socket::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                tune(stream.as_fd(), None);
                Ok(Accepted::Unix(stream))
            }
            Socket::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                tune(stream.as_fd(), Some(&stream));
                Ok(Accepted::Tcp(stream, peer))
            }
        }
    }
}

/// Removes the socket of a dead server; refuses a living one.
fn make_way(path: &Path) -> Result<(), ListenError> {
    let failed = |source| ListenError::Io { address: path.display().to_string(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(ListenError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        // EAGAIN: its backlog is full, so somebody listens.
        _ => Err(ListenError::InUse(path.display().to_string())),
    }
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&fd, &address)?;
    rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR)?;
    rustix::net::listen(&fd, BACKLOG)?;
    Ok(fd.into())
}

/// Descriptors 3.. passed by systemd (`LISTEN_PID`, `LISTEN_FDS`), the first
/// time it is called; empty otherwise.
pub fn inherited() -> Vec<OwnedFd> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    let ours = number("LISTEN_PID") == Some(std::process::id());
    let count = number("LISTEN_FDS").unwrap_or(0).min(INHERITED_MAX) as i32;
    if !ours || TAKEN.swap(true, Ordering::SeqCst) {
        return Vec::new();
    }
    (FIRST_INHERITED..FIRST_INHERITED + count)
        .filter_map(|number| {
            // SAFETY: systemd's protocol gives these numbers to the process whose
            // id is LISTEN_PID, that is us, and `TAKEN` lets them be taken once;
            // nothing else in this program knows of them.
            let fd = unsafe { OwnedFd::from_raw_fd(number) };
            match rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC) {
                Ok(()) => Some(fd),
                Err(_) => {
                    // Not open at all: it must not be closed either.
                    std::mem::forget(fd);
                    None
                }
            }
        })
        .collect()
}

/// Buffer sizes and no delays, as far as the system allows.
pub fn tune(fd: BorrowedFd<'_>, tcp: Option<&TcpStream>) {
    // Larger than net.core.wmem_max needs CAP_NET_ADMIN; either is fine.
    if sockopt::set_socket_send_buffer_size_force(fd, SOCKET_BUFFER).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(fd, SOCKET_BUFFER);
    }
    if sockopt::set_socket_recv_buffer_size_force(fd, SOCKET_BUFFER).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(fd, SOCKET_BUFFER);
    }
    if let Some(stream) = tcp {
        let _ = stream.set_nodelay(true);
        // A peer that vanished without a word is noticed within about a minute.
        let _ = sockopt::set_socket_keepalive(stream, true);
        let _ = sockopt::set_tcp_keepidle(stream, Duration::from_secs(30));
        let _ = sockopt::set_tcp_keepintvl(stream, Duration::from_secs(10));
        let _ = sockopt::set_tcp_keepcnt(stream, 3);
        let _ = sockopt::set_tcp_user_timeout(stream, 60_000);
    }
}

const BACKLOG: i32 = 128;
const FIRST_INHERITED: i32 = 3;
const INHERITED_MAX: u32 = 64;
/// In bytes; each way, a socket.
const SOCKET_BUFFER: usize = 2 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_servers_socket_is_replaced_and_a_living_ones_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let address = Address::Unix(path.clone());
        let first = UnixListener::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&address), Err(ListenError::InUse(_))));
        drop(first);
        assert!(path.exists());
        let second = Listener::bind(&address).unwrap();
        assert_eq!(second.address().unwrap(), address);
        let mode = std::fs::metadata(&path).unwrap();
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777, 0o600);
        drop(second);
        assert!(!path.exists());
        let file = dir.path().join("file");
        std::fs::write(&file, b"precious").unwrap();
        let refused = Listener::bind(&Address::Unix(file.clone()));
        assert!(matches!(refused, Err(ListenError::NotASocket(_))));
        assert_eq!(std::fs::read(file).unwrap(), b"precious");
    }

    #[test]
    fn addresses_are_parsed_or_refused() {
        assert_eq!("unix:/a:1".parse(), Ok(Address::Unix("/a:1".into())));
        assert_eq!("[::1]:10809".parse(), Ok(Address::Tcp("[::1]:10809".to_owned())));
        for bad in ["", "unix:", "host", "host:", ":1", "host:99999"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}
