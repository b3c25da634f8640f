//! A small blocking NBD client, written from the protocol's text and sharing no
//! code with ours, so that both ends of a mistake are not the same mistake.
//!
//! One request at a time; several connections are several clients. After an
//! error the connection is useless: connect again.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A connection to one export.
#[derive(Debug)]
pub struct Client {
    stream: Stream,
    cookie: u64,
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
}

#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// What a server answered, other than data.
#[derive(Debug)]
pub enum NbdError {
    /// The server answered with this error; the connection is good.
    Refused(u32),
    /// The connection failed.
    Lost(io::Error),
}

impl From<io::Error> for NbdError {
    fn from(error: io::Error) -> Self {
        Self::Lost(error)
    }
}

/// Splits `nbd+unix:///EXPORT?socket=PATH` or `nbd://HOST:PORT/EXPORT`.
fn dial(uri: &str) -> io::Result<(Stream, String)> {
    let bad = || io::Error::other(format!("not an NBD URI: {uri}"));
    if let Some(rest) = uri.strip_prefix("nbd+unix:///") {
        let (export, socket) = rest.split_once("?socket=").ok_or_else(bad)?;
        return Ok((Stream::Unix(UnixStream::connect(decode(socket))?), decode(export)));
    }
    let rest = uri.strip_prefix("nbd://").ok_or_else(bad)?;
    let (host, export) = rest.split_once('/').ok_or_else(bad)?;
    let stream = TcpStream::connect(host)?;
    stream.set_nodelay(true)?;
    Ok((Stream::Tcp(stream), decode(export)))
}

fn decode(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let mut hex = || (bytes.next().unwrap_or(b'0') as char).to_digit(16).unwrap_or(0) as u8;
        out.push(if byte == b'%' { hex() << 4 | hex() } else { byte });
    }
    String::from_utf8_lossy(&out).into_owned()
}

impl Client {
    /// Connects and opens the export, with a time limit on every later call.
    pub fn connect(uri: &str, limit: Duration) -> io::Result<Self> {
        let (stream, export) = dial(uri)?;
        stream.limit(limit)?;
        let mut client = Self { stream, cookie: 0, size: 0, flags: 0 };
        client.handshake(&export)?;
        Ok(client)
    }

    fn handshake(&mut self, export: &str) -> io::Result<()> {
        let mut head = [0; 18];
        self.stream.read_exact(&mut head)?;
        if &head[..16] != b"NBDMAGICIHAVEOPT" {
            return Err(io::Error::other("not a newstyle NBD server"));
        }
        // Fixed newstyle, no zeroes.
        self.stream.write_all(&3_u32.to_be_bytes())?;
        let mut data = (export.len() as u32).to_be_bytes().to_vec();
        data.extend_from_slice(export.as_bytes());
        data.extend_from_slice(&0_u16.to_be_bytes());
        let mut option = b"IHAVEOPT".to_vec();
        option.extend_from_slice(&7_u32.to_be_bytes());
        option.extend_from_slice(&(data.len() as u32).to_be_bytes());
        option.extend_from_slice(&data);
        self.stream.write_all(&option)?;
        loop {
            let mut reply = [0; 20];
            self.stream.read_exact(&mut reply)?;
            let kind = u32::from_be_bytes(reply[12..16].try_into().unwrap());
            let len = u32::from_be_bytes(reply[16..20].try_into().unwrap());
            let mut body = vec![0; len.min(1 << 16) as usize];
            self.stream.read_exact(&mut body)?;
            match kind {
                1 => return Ok(()),
                3 if body.len() == 12 && body[..2] == [0, 0] => {
                    self.size = u64::from_be_bytes(body[2..10].try_into().unwrap());
                    self.flags = u16::from_be_bytes(body[10..12].try_into().unwrap());
                }
                3 => {}
                other => {
                    let text = String::from_utf8_lossy(&body);
                    return Err(io::Error::other(format!("refused with {other:#x}: {text}")));
                }
            }
        }
    }

    fn request(
        &mut self,
        kind: u16,
        flags: u16,
        offset: u64,
        len: u32,
        payload: &[u8],
    ) -> Result<(), NbdError> {
        self.cookie += 1;
        let mut head = 0x2560_9513_u32.to_be_bytes().to_vec();
        head.extend_from_slice(&flags.to_be_bytes());
        head.extend_from_slice(&kind.to_be_bytes());
        head.extend_from_slice(&self.cookie.to_be_bytes());
        head.extend_from_slice(&offset.to_be_bytes());
        head.extend_from_slice(&len.to_be_bytes());
        head.extend_from_slice(payload);
        self.stream.write_all(&head)?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        if reply[..4] != 0x6744_6698_u32.to_be_bytes() || reply[8..] != self.cookie.to_be_bytes() {
            return Err(io::Error::other("not the reply to our request").into());
        }
        match u32::from_be_bytes(reply[4..8].try_into().unwrap()) {
            0 => Ok(()),
            error => Err(NbdError::Refused(error)),
        }
    }

    /// Reads.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), NbdError> {
        self.request(0, 0, offset, buf.len() as u32, &[])?;
        Ok(self.stream.read_exact(buf)?)
    }

    /// Writes.
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<(), NbdError> {
        self.request(1, u16::from(fua), offset, data.len() as u32, data)
    }

    /// FLUSH.
    pub fn flush(&mut self) -> Result<(), NbdError> {
        self.request(3, 0, 0, 0, &[])
    }

    /// TRIM.
    pub fn trim(&mut self, offset: u64, len: u32, fua: bool) -> Result<(), NbdError> {
        self.request(4, u16::from(fua), offset, len, &[])
    }

    /// WRITE_ZEROES.
    pub fn zero(&mut self, offset: u64, len: u32, fua: bool) -> Result<(), NbdError> {
        self.request(6, u16::from(fua), offset, len, &[])
    }

    /// Reads the whole export.
    pub fn read_all(&mut self) -> Result<Vec<u8>, NbdError> {
        let mut data = vec![0; self.size as usize];
        for (number, part) in data.chunks_mut(1 << 20).enumerate() {
            self.read((number as u64) << 20, part)?;
        }
        Ok(data)
    }

    /// Says goodbye.
    pub fn disconnect(mut self) {
        let mut head = 0x2560_9513_u32.to_be_bytes().to_vec();
        head.extend_from_slice(&[0, 0, 0, 2]);
        head.extend_from_slice(&[0; 20]);
        let _ = self.stream.write_all(&head);
    }
}

impl Stream {
    fn limit(&self, limit: Duration) -> io::Result<()> {
        match self {
            Self::Unix(s) => s.set_read_timeout(Some(limit)).and(s.set_write_timeout(Some(limit))),
            Self::Tcp(s) => s.set_read_timeout(Some(limit)).and(s.set_write_timeout(Some(limit))),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(s) => s.read(buf),
            Self::Tcp(s) => s.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(s) => s.write(buf),
            Self::Tcp(s) => s.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
