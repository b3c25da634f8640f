//! A line between agent and target that a test can cut, silence or slow down.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::site::Site;

/// What the line does with bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// Passes them on.
    Passes,
    /// So many bytes, both ways together, then as [`Line::Holds`].
    Only(u64),
    /// Takes what the sockets hold, and passes nothing on.
    Holds,
    /// Each piece so much later.
    Slow(Duration),
}

#[derive(Debug)]
struct State {
    line: Line,
    /// Both ends of every connection.
    open: Vec<TcpStream>,
}

/// Forwards TCP connections to `to`.
#[derive(Clone, Debug)]
pub struct Proxy {
    /// Where it listens.
    pub listen: String,
    state: Arc<(Mutex<State>, Condvar)>,
}

impl Proxy {
    /// Starts; it ends with the process.
    pub fn start(to: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let listen = listener.local_addr().unwrap().to_string();
        let state = Mutex::new(State { line: Line::Passes, open: Vec::new() });
        let this = Self { listen, state: Arc::new((state, Condvar::new())) };
        let shared = this.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(&to) else { continue };
                shared.connect(client, server);
            }
        });
        this
    }

    fn connect(&self, client: TcpStream, server: TcpStream) {
        let ends = [client.try_clone().unwrap(), server.try_clone().unwrap()];
        self.state.0.lock().unwrap().open.extend(ends);
        let back = (server.try_clone().unwrap(), client.try_clone().unwrap());
        for (from, to) in [(client, server), back] {
            let this = self.clone();
            std::thread::spawn(move || this.forward(from, to));
        }
    }

    fn forward(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut piece = [0; 16 << 10];
        while let Ok(count @ 1..) = from.read(&mut piece) {
            // Nothing is passed on once `set` said that the line holds.
            let mut state = self.state.0.lock().unwrap();
            if let Line::Slow(late) = state.line {
                let slow = |s: &mut State| matches!(s.line, Line::Slow(_));
                state = self.state.1.wait_timeout_while(state, late, slow).unwrap().0;
            }
            let bytes = count as u64;
            let holds = |s: &mut State| match s.line {
                Line::Holds => true,
                Line::Only(left) => left < bytes,
                Line::Passes | Line::Slow(_) => false,
            };
            state = self.state.1.wait_while(state, holds).unwrap();
            if let Line::Only(left) = &mut state.line {
                *left -= bytes;
            }
            drop(state);
            if to.write_all(&piece[..count]).is_err() {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }

    /// From now on the line does this.
    pub fn set(&self, line: Line) {
        self.state.0.lock().unwrap().line = line;
        self.state.1.notify_all();
    }

    /// Ends every connection.
    pub fn cut(&self) {
        for end in self.state.0.lock().unwrap().open.drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

/// Threads that wait must end with the test.
#[derive(Debug)]
pub struct PassOnDrop<'a>(pub &'a Proxy);

impl Drop for PassOnDrop<'_> {
    fn drop(&mut self) {
        self.0.set(Line::Passes);
    }
}

/// A site whose agent reaches its target through a proxy.
pub fn start(name: &str) -> (Site, Proxy) {
    let mut site = Site::empty(name);
    let proxy = Proxy::start(site.listen.clone());
    let (listen, advertise) = (site.listen.clone(), proxy.listen.clone());
    let init = ["target", "init", "--listen", &listen, "--advertise", &advertise];
    let token = site.at_target(&init).ok().json()["token"].as_str().unwrap().to_owned();
    site.start_target();
    site.join(&token).ok();
    site.start_agent();
    (site, proxy)
}
