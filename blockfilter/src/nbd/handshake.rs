//! The server's side of the fixed newstyle handshake, without I/O.
//!
//! Owns: what was negotiated so far. Bytes go in by
//! [`Handshake::handle_bytes`], events come out by [`Handshake::poll_event`];
//! the driver answers [`HandshakeEvent::ListExports`] by
//! [`Handshake::listed`], [`HandshakeEvent::OpenExport`] by
//! [`Handshake::opened`] and [`HandshakeEvent::StartTls`] by
//! [`Handshake::tls_started`]. While an answer is due no input is taken.
//!
//! Holds: nothing is allocated by an unchecked length; the bytes and options of
//! one handshake are bounded; nothing that was negotiated or sent in the clear
//! survives STARTTLS (CVE-2021-3716). Never: reads a clock (the driver
//! bounds the time) or looks at an export's data.

use std::collections::VecDeque;

use super::proto::{
    CLIENT_FIXED_NEWSTYLE, CLIENT_NO_ZEROES, Context, Contexts, FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES, Fields, MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, Put, STRING_MAX, flag, info,
    opt, rep,
};
use crate::block::{ExportInfo, PAYLOAD_MAX};

/// Whether STARTTLS is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// No.
    Off,
    /// Clients may use it.
    Offered,
    /// Nothing is told before it.
    Required,
}

/// What a handshake depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandshakeConfig {
    /// Whether STARTTLS is known.
    pub tls: TlsMode,
}

/// What the driver does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandshakeEvent {
    /// Send these bytes.
    Send(Vec<u8>),
    /// Send what is due, throw away everything received in the clear, change to
    /// TLS, then call [`Handshake::tls_started`].
    StartTls,
    /// Answer with [`Handshake::listed`].
    ListExports,
    /// Answer with [`Handshake::opened`].
    OpenExport {
        /// As sent; `""` asks for the default export.
        name: String,
        /// No transmission follows this open.
        info_only: bool,
    },
    /// The handshake is over; what input was not consumed are requests.
    Transmission(Box<Negotiated>),
    /// Close the connection. The text is for the log.
    Close(&'static str),
}

/// What was agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The name the client asked for.
    pub name: String,
    /// The export as the driver gave it.
    pub export: ExportInfo,
    /// Structured replies.
    pub structured: bool,
    /// The metadata contexts that BLOCK_STATUS is answered in; none without structured replies.
    pub contexts: Contexts,
    /// Smallest request in bytes: the export's, or 1 for a client that did not
    /// ask for block sizes.
    pub block_min: u32,
}

/// Why an export was not opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// There is none of that name.
    #[error("there is no export {0:?}")]
    Unknown(String),
    /// The peer may not use it.
    #[error("not allowed: {0}")]
    Denied(String),
    /// It cannot be opened now; the text says why.
    #[error("{0}")]
    Unavailable(String),
    /// The server is going away.
    #[error("the server is shutting down")]
    Shutdown,
}

#[derive(Debug)]
enum State {
    ClientFlags,
    /// Waiting for an option's header.
    Option,
    /// Waiting for `len` bytes of the option's data.
    Data {
        option: u32,
        len: usize,
    },
    /// Throwing the option's data away, then answering with an error.
    Skip {
        option: u32,
        left: usize,
        error: u32,
    },
    /// An answer of the driver is due.
    Listing,
    Opening(Open),
    StartingTls,
    /// Transmission or closed.
    Done,
}

/// What the export is opened for.
#[derive(Debug)]
struct Open {
    option: u32,
    name: String,
    /// Information asked for by INFO or GO.
    wants: Wants,
    /// What the queries of a META_CONTEXT option name.
    queried: Contexts,
}

#[derive(Clone, Copy, Debug, Default)]
struct Wants {
    name: bool,
    description: bool,
    block_size: bool,
}

/// One handshake.
#[derive(Debug)]
pub struct Handshake {
    config: HandshakeConfig,
    state: State,
    input: Vec<u8>,
    events: VecDeque<HandshakeEvent>,
    no_zeroes: bool,
    fixed: bool,
    secure: bool,
    structured: bool,
    /// The contexts that were chosen, and for which export.
    chosen: Option<(String, Contexts)>,
    bytes: usize,
    options: usize,
}

impl Handshake {
    /// Begins; the greeting is the first event.
    pub fn new(config: HandshakeConfig) -> Self {
        let mut greeting = Vec::with_capacity(18);
        greeting.put64(MAGIC);
        greeting.put64(OPTION_MAGIC);
        greeting.put16(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        Self {
            config,
            state: State::ClientFlags,
            input: Vec::new(),
            events: VecDeque::from([HandshakeEvent::Send(greeting)]),
            no_zeroes: false,
            fixed: false,
            secure: false,
            structured: false,
            chosen: None,
            bytes: 0,
            options: 0,
        }
    }

    /// Takes input and tells how many bytes of it were consumed; the rest is to
    /// be given again once the driver has answered, or are requests once
    /// [`HandshakeEvent::Transmission`] came.
    pub fn handle_bytes(&mut self, input: &[u8]) -> usize {
        let mut rest = input;
        while !rest.is_empty() {
            let wanted = match &self.state {
                State::ClientFlags => 4,
                State::Option => OPTION_LEN,
                State::Data { len, .. } => *len,
                State::Skip { left, .. } => *left,
                State::StartingTls => return input.len(),
                State::Listing | State::Opening(_) | State::Done => break,
            };
            let take = (wanted - self.input.len()).min(rest.len());
            let (now, later) = rest.split_at(take);
            rest = later;
            self.bytes += take;
            if self.bytes > BYTES_MAX {
                self.close("too many bytes before transmission");
                break;
            }
            if let State::Skip { option, left, error } = &mut self.state {
                *left -= take;
                if *left == 0 {
                    let (option, error) = (*option, *error);
                    self.state = State::Option;
                    self.reply(option, error, &[]);
                }
                continue;
            }
            self.input.extend_from_slice(now);
            if self.input.len() == wanted {
                let data = std::mem::take(&mut self.input);
                self.step(&data);
            }
        }
        if matches!(self.state, State::StartingTls) {
            input.len()
        } else {
            input.len() - rest.len()
        }
    }

    /// What to do next; None until more input or an answer comes.
    pub fn poll_event(&mut self) -> Option<HandshakeEvent> {
        self.events.pop_front()
    }

    /// Whether an answer of the driver is due.
    pub fn is_waiting(&self) -> bool {
        matches!(self.state, State::Listing | State::Opening(_) | State::StartingTls)
    }

    /// Answers [`HandshakeEvent::ListExports`].
    pub fn listed<S: AsRef<str>>(&mut self, names: impl IntoIterator<Item = S>) {
        if !matches!(self.state, State::Listing) {
            return;
        }
        self.state = State::Option;
        for name in names {
            let name = name.as_ref();
            if name.len() <= STRING_MAX {
                let mut data = Vec::with_capacity(4 + name.len());
                data.put32(name.len() as u32);
                data.extend_from_slice(name.as_bytes());
                self.reply(opt::LIST, rep::SERVER, &data);
            }
        }
        self.reply(opt::LIST, rep::ACK, &[]);
    }

    /// Answers [`HandshakeEvent::OpenExport`].
    pub fn opened(&mut self, result: Result<ExportInfo, OpenError>) {
        if !matches!(self.state, State::Opening(_)) {
            return;
        }
        let State::Opening(open) = std::mem::replace(&mut self.state, State::Option) else {
            return;
        };
        match (result, open.option) {
            (Ok(export), opt::EXPORT_NAME) => self.begin_by_name(open, export),
            (Ok(export), opt::INFO | opt::GO) => self.inform(open, export),
            (Ok(export), _) => self.meta_context(open, &export),
            (Err(_), opt::EXPORT_NAME) => self.close("the export asked for cannot be opened"),
            (Err(error), option) => {
                let code = match &error {
                    OpenError::Unknown(_) => rep::ERR_UNKNOWN,
                    OpenError::Denied(_) | OpenError::Unavailable(_) => rep::ERR_POLICY,
                    OpenError::Shutdown => rep::ERR_SHUTDOWN,
                };
                // A client may take a text beyond the protocol's limit for an attack.
                let text: String = error.to_string().chars().take(ERROR_CHARS_MAX).collect();
                self.reply(option, code, text.as_bytes());
            }
        }
    }

    /// TLS is up: all that was negotiated before is forgotten.
    pub fn tls_started(&mut self) {
        if matches!(self.state, State::StartingTls) {
            self.state = State::Option;
            self.secure = true;
            self.structured = false;
            self.chosen = None;
            self.input.clear();
        }
    }

    fn step(&mut self, data: &[u8]) {
        match std::mem::replace(&mut self.state, State::Option) {
            State::ClientFlags => self.client_flags(data),
            State::Option => self.option_header(data),
            State::Data { option, .. } => self.option(option, data),
            state => self.state = state,
        }
    }

    fn client_flags(&mut self, data: &[u8]) {
        let flags = Fields(data).u32().unwrap_or(u32::MAX);
        if flags & !(CLIENT_FIXED_NEWSTYLE | CLIENT_NO_ZEROES) != 0 {
            return self.close("unknown client flags");
        }
        self.fixed = flags & CLIENT_FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & CLIENT_NO_ZEROES != 0;
    }

    fn option_header(&mut self, data: &[u8]) {
        let mut fields = Fields(data);
        let header = (fields.u64(), fields.u32(), fields.u32());
        let (Some(OPTION_MAGIC), Some(option), Some(len)) = header else {
            return self.close("not an option");
        };
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return self.close("too many options");
        }
        let len = len as usize;
        if len > BYTES_MAX {
            return self.close("an option larger than a whole handshake may be");
        }
        if !self.fixed && option != opt::EXPORT_NAME {
            return self.close("an option that needs fixed newstyle");
        }
        let cleartext = self.config.tls == TlsMode::Required && !self.secure;
        let refusal = match option {
            opt::ABORT | opt::STARTTLS => None,
            _ if cleartext => Some(rep::ERR_TLS_REQD),
            opt::EXPORT_NAME
            | opt::LIST
            | opt::INFO
            | opt::GO
            | opt::STRUCTURED_REPLY
            | opt::LIST_META_CONTEXT
            | opt::SET_META_CONTEXT => None,
            _ => Some(rep::ERR_UNSUP),
        };
        let refusal = refusal.or((len > OPTION_DATA_MAX).then_some(rep::ERR_TOO_BIG));
        match refusal {
            // EXPORT_NAME has no error reply.
            Some(_) if option == opt::EXPORT_NAME => self.close("EXPORT_NAME refused"),
            Some(error) if len == 0 => self.reply(option, error, &[]),
            Some(error) => self.state = State::Skip { option, left: len, error },
            None if len == 0 => self.option(option, &[]),
            None => self.state = State::Data { option, len },
        }
    }

    fn option(&mut self, option: u32, data: &[u8]) {
        let empty = data.is_empty();
        match option {
            opt::EXPORT_NAME => match std::str::from_utf8(data) {
                Ok(name) if name.len() <= STRING_MAX => self.open(option, name, Wants::default()),
                _ => self.close("bad export name"),
            },
            opt::ABORT => {
                self.reply(option, rep::ACK, &[]);
                self.close("aborted by the client");
            }
            opt::LIST if empty => {
                self.state = State::Listing;
                self.events.push_back(HandshakeEvent::ListExports);
            }
            opt::STARTTLS if self.config.tls == TlsMode::Off => {
                self.reply(option, rep::ERR_UNSUP, &[]);
            }
            opt::STARTTLS if empty && !self.secure => {
                self.reply(option, rep::ACK, &[]);
                self.state = State::StartingTls;
                self.events.push_back(HandshakeEvent::StartTls);
            }
            opt::STRUCTURED_REPLY if empty => {
                self.structured = true;
                self.reply(option, rep::ACK, &[]);
            }
            opt::INFO | opt::GO => match parse_info(data) {
                Some((name, wants)) => self.open(option, name, wants),
                None => self.reply(option, rep::ERR_INVALID, &[]),
            },
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.queries(option, data),
            _ => self.reply(option, rep::ERR_INVALID, &[]),
        }
    }

    fn queries(&mut self, option: u32, data: &[u8]) {
        if option == opt::SET_META_CONTEXT {
            self.chosen = None;
        }
        let parsed = parse_queries(data, option == opt::LIST_META_CONTEXT);
        match parsed {
            Some((name, queried)) if self.structured => {
                self.open(option, name, Wants::default());
                if let State::Opening(open) = &mut self.state {
                    open.queried = queried;
                }
            }
            _ => self.reply(option, rep::ERR_INVALID, &[]),
        }
    }

    fn open(&mut self, option: u32, name: &str, wants: Wants) {
        let name = name.to_owned();
        let info_only = !matches!(option, opt::EXPORT_NAME | opt::GO);
        self.events.push_back(HandshakeEvent::OpenExport { name: name.clone(), info_only });
        self.state = State::Opening(Open { option, name, wants, queried: Contexts::default() });
    }

    fn begin_by_name(&mut self, open: Open, export: ExportInfo) {
        let mut out = Vec::with_capacity(134);
        out.put64(export.size);
        out.put16(transmission_flags(&export, self.structured));
        if !self.no_zeroes {
            out.resize(out.len() + 124, 0);
        }
        self.send(&out);
        self.transmission(open, export);
    }

    fn inform(&mut self, open: Open, export: ExportInfo) {
        let option = open.option;
        let mut data = Vec::new();
        data.put16(info::EXPORT);
        data.put64(export.size);
        data.put16(transmission_flags(&export, self.structured));
        self.reply(option, rep::INFO, &data);
        if open.wants.name {
            self.reply_text(option, info::NAME, &open.name);
        }
        if open.wants.description && !export.description.is_empty() {
            self.reply_text(option, info::DESCRIPTION, &export.description);
        }
        let mut data = Vec::new();
        data.put16(info::BLOCK_SIZE);
        data.put32(if open.wants.block_size { export.block_min } else { 1 });
        data.put32(export.block_preferred);
        data.put32(PAYLOAD_MAX);
        self.reply(option, rep::INFO, &data);
        self.reply(option, rep::ACK, &[]);
        if option == opt::GO {
            self.transmission(open, export);
        }
    }

    fn meta_context(&mut self, open: Open, export: &ExportInfo) {
        let set = open.option == opt::SET_META_CONTEXT;
        let found = open.queried.and(contexts_of(export));
        for context in Context::ALL.into_iter().filter(|c| found.has(*c)) {
            let mut data = Vec::new();
            data.put32(if set { context.id() } else { 0 });
            data.extend_from_slice(context.name().as_bytes());
            self.reply(open.option, rep::META_CONTEXT, &data);
        }
        if set {
            self.chosen = Some((open.name, found));
        }
        self.reply(open.option, rep::ACK, &[]);
    }

    fn transmission(&mut self, open: Open, export: ExportInfo) {
        let chosen = self.chosen.as_ref().filter(|(name, _)| self.structured && *name == open.name);
        // An export whose name moved may have less than the one that was asked.
        let contexts = chosen.map_or(Contexts::default(), |c| c.1.and(contexts_of(&export)));
        let block_min = if open.wants.block_size { export.block_min } else { 1 };
        self.state = State::Done;
        self.events.push_back(HandshakeEvent::Transmission(Box::new(Negotiated {
            name: open.name,
            structured: self.structured,
            contexts,
            block_min,
            export,
        })));
    }

    fn reply_text(&mut self, option: u32, kind: u16, text: &str) {
        let mut data = Vec::with_capacity(2 + text.len());
        data.put16(kind);
        let fits = text.char_indices().map(|(at, c)| at + c.len_utf8());
        let end = fits.take_while(|end| *end <= STRING_MAX).last().unwrap_or(0);
        data.extend_from_slice(&text.as_bytes()[..end]);
        self.reply(option, rep::INFO, &data);
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        let mut out = Vec::with_capacity(20 + data.len());
        out.put64(OPTION_REPLY_MAGIC);
        out.put32(option);
        out.put32(kind);
        out.put32(data.len() as u32);
        out.extend_from_slice(data);
        self.send(&out);
    }

    fn send(&mut self, bytes: &[u8]) {
        match self.events.back_mut() {
            Some(HandshakeEvent::Send(last)) => last.extend_from_slice(bytes),
            _ => self.events.push_back(HandshakeEvent::Send(bytes.to_vec())),
        }
    }

    fn close(&mut self, why: &'static str) {
        self.state = State::Done;
        self.events.push_back(HandshakeEvent::Close(why));
    }
}

/// The flags of an export in transmission.
pub fn transmission_flags(export: &ExportInfo, structured: bool) -> u16 {
    let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_CACHE;
    if structured {
        flags |= flag::SEND_DF;
    }
    if export.multi_conn {
        flags |= flag::CAN_MULTI_CONN;
    }
    if export.read_only {
        return flags | flag::READ_ONLY;
    }
    flags |= flag::SEND_FUA | flag::SEND_WRITE_ZEROES;
    if export.trim {
        flags |= flag::SEND_TRIM;
    }
    if export.fast_zero {
        flags |= flag::SEND_FAST_ZERO;
    }
    flags
}

fn contexts_of(export: &ExportInfo) -> Contexts {
    let always = Contexts::default().with(Context::Allocation);
    if export.dirty_map { always.with(Context::Dirty) } else { always }
}

/// The name an empty one stands for: the only export, if there is exactly one.
pub fn default_export<'a>(name: &'a str, exports: &'a [String]) -> &'a str {
    match exports {
        [only] if name.is_empty() => only,
        _ => name,
    }
}

fn parse_info(data: &[u8]) -> Option<(&str, Wants)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u16()?;
    let mut wants = Wants::default();
    for _ in 0..count {
        match fields.u16()? {
            info::NAME => wants.name = true,
            info::DESCRIPTION => wants.description = true,
            info::BLOCK_SIZE => wants.block_size = true,
            _ => {}
        }
    }
    fields.0.is_empty().then_some((name, wants))
}

/// The export's name, and the contexts that the queries name; no query lists all.
fn parse_queries(data: &[u8], list: bool) -> Option<(&str, Contexts)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    let mut found = if list && count == 0 { Contexts::ALL } else { Contexts::default() };
    // Each turn takes at least 4 bytes of `data`, or ends.
    for _ in 0..count {
        let query = fields.string()?;
        let meant = Context::ALL.into_iter().filter(|c| c.is_meant(query, list));
        found = meant.fold(found, Contexts::with);
    }
    fields.0.is_empty().then_some((name, found))
}

/// Length of an option's header.
const OPTION_LEN: usize = 16;
/// Largest payload of an option that is looked at, in bytes.
const OPTION_DATA_MAX: usize = 64 << 10;
/// Longest error text, in characters.
const ERROR_CHARS_MAX: usize = 512;
/// Most bytes a client may send before transmission.
const BYTES_MAX: usize = 1 << 20;
/// Most options in one handshake.
const OPTIONS_MAX: usize = 256;

const _: () = assert!(4 * ERROR_CHARS_MAX < STRING_MAX);
const _: () = assert!(OPTION_DATA_MAX > 2 * STRING_MAX && BYTES_MAX > OPTION_DATA_MAX);

#[cfg(test)]
mod tests;
