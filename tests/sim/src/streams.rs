//! Streams between two hosts as QUIC gives them to a shell, over the world's datagrams: each reliable and
//! in order, independent of the others, with resets, flow control, and connections that get lost.
//!
//! A model of what the users of streams must survive, not of QUIC's packets: one message is one
//! datagram, retransmission is a timer, and without a handshake a late duplicate can even open a
//! connection that its dialler has forgotten, if its acceptor was started anew: QUIC would not allow that.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bincode::{Decode, Encode};
use protocol::random::Random;
use protocol::{Duration, Instant, wire};

use crate::actor::{Effect, NodeIndex};

/// One stream of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamRef {
    pub connection: u64,
    /// As in QUIC: bit 0 is set if the acceptor of the connection opened it, bit 1 if it is one-way.
    pub number: u32,
}

/// What the user of streams is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEvent {
    /// [`Streams::read`] has something.
    Readable { stream: StreamRef, peer: NodeIndex },
    /// Reset by the peer, or down with its connection. Nothing more can be read or written.
    Broken { stream: StreamRef },
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Item {
    Message(Vec<u8>),
    /// Nothing follows.
    End,
}

/// All connections of one host.
#[derive(Debug)]
pub struct Streams {
    random: Random,
    connections: BTreeMap<u64, Connection>,
    dialled: BTreeMap<NodeIndex, u64>,
    /// Connections that were lost: a late duplicate must not open them again.
    lost: BTreeSet<u64>,
    pub events: VecDeque<StreamEvent>,
}

#[derive(Debug)]
struct Connection {
    peer: NodeIndex,
    dialler: bool,
    answered: bool,
    streams: BTreeMap<u32, Stream>,
    /// Resets that the peer has not confirmed: when they are sent again.
    resets: BTreeMap<u32, Retry>,
    /// By the two low bits of a stream's number: the first that was not opened yet.
    next: [u32; 4],
    heard: Instant,
    pinged: Instant,
}

#[derive(Debug)]
struct Stream {
    send: Option<SendSide>,
    receive: Option<ReceiveSide>,
}

#[derive(Debug, Default)]
struct SendSide {
    /// Not confirmed; the first has the number `base`.
    queue: VecDeque<Item>,
    base: u32,
    /// Sent at least once: all before this.
    sent: u32,
    /// Of the peer.
    consumed: u32,
    ended: bool,
    retry: Option<Retry>,
}

#[derive(Debug, Default)]
struct ReceiveSide {
    early: BTreeMap<u32, Item>,
    /// All before this have arrived.
    received: u32,
    consumed: u32,
    told: u32,
    ended: bool,
}

#[derive(Clone, Copy, Debug)]
struct Retry {
    at: Instant,
    wait: Duration,
}

#[derive(Clone, Debug, Encode, Decode)]
struct Packet {
    connection: u64,
    body: Body,
}

#[derive(Clone, Debug, Encode, Decode)]
enum Body {
    /// `opens` the connection, too: its dialler has heard nothing on it yet.
    Data {
        number: u32,
        sequence: u32,
        opens: bool,
        item: Item,
    },
    Ack {
        number: u32,
        received: u32,
        consumed: u32,
    },
    /// Asks for an `Ack`.
    Probe {
        number: u32,
    },
    Reset {
        number: u32,
    },
    /// The stream is over here.
    Gone {
        number: u32,
    },
    Ping,
    Pong,
    /// There is no such connection here.
    Unknown,
}

impl Streams {
    pub fn new(seed: u64) -> Self {
        Streams {
            random: Random::new(seed),
            connections: BTreeMap::new(),
            dialled: BTreeMap::new(),
            lost: BTreeSet::new(),
            events: VecDeque::new(),
        }
    }

    /// Streams that are not over, at either end as far as this host knows.
    pub fn open_streams(&self) -> usize {
        self.connections.values().map(|c| c.streams.len() + c.resets.len()).sum()
    }

    /// Opens a stream both ways on a connection that this host has dialled, or dials now.
    pub fn open(&mut self, now: Instant, peer: NodeIndex) -> StreamRef {
        let connection = match self.dialled.get(&peer) {
            Some(id) => *id,
            None => {
                let id = self.random.next_u64();
                self.connections.insert(id, Connection::new(now, peer, true));
                self.dialled.insert(peer, id);
                id
            }
        };
        let open = self.connections.get_mut(&connection).expect("it is dialled");
        StreamRef { connection, number: open.open_own(false) }
    }

    /// Opens a one-way stream on the connection of `beside`, if that still exists.
    pub fn open_one_way(&mut self, beside: StreamRef) -> Option<StreamRef> {
        let connection = self.connections.get_mut(&beside.connection)?;
        Some(StreamRef { number: connection.open_own(true), ..beside })
    }

    /// Queues a message; nothing if the stream is over.
    pub fn write(
        &mut self,
        now: Instant,
        stream: StreamRef,
        bytes: Vec<u8>,
        out: &mut Vec<Effect>,
    ) {
        self.push(now, stream, Item::Message(bytes), out);
    }

    pub fn finish(&mut self, now: Instant, stream: StreamRef, out: &mut Vec<Effect>) {
        self.push(now, stream, Item::End, out);
    }

    /// Whether the peer's window has no room: what is written now waits here.
    pub fn is_blocked(&self, stream: StreamRef) -> bool {
        let side = self.connections.get(&stream.connection);
        let side = side.and_then(|c| c.streams.get(&stream.number)?.send.as_ref());
        side.is_some_and(|send| send.queue.len() >= WINDOW as usize)
    }

    /// The next item of the stream, if it has arrived.
    pub fn read(&mut self, stream: StreamRef, out: &mut Vec<Effect>) -> Option<Item> {
        let StreamRef { connection: id, number } = stream;
        let connection = self.connections.get_mut(&id)?;
        let peer = connection.peer;
        let side = connection.streams.get_mut(&number)?.receive.as_mut()?;
        let item = side.early.remove(&side.consumed)?;
        side.consumed += 1;
        side.ended |= item == Item::End;
        if side.consumed - side.told >= WINDOW / 2 {
            side.told = side.consumed;
            let (received, consumed) = (side.received, side.consumed);
            send(out, id, peer, Body::Ack { number, received, consumed });
        }
        connection.remove_if_over(number);
        Some(item)
    }

    /// Ends the stream in both directions, at both ends.
    pub fn reset(&mut self, now: Instant, stream: StreamRef, out: &mut Vec<Effect>) {
        let StreamRef { connection: id, number } = stream;
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.streams.remove(&number).is_some() {
            connection.resets.insert(number, Retry::first(now));
            send(out, id, connection.peer, Body::Reset { number });
        }
    }

    pub fn next_deadline(&self) -> Option<Instant> {
        self.connections.values().map(Connection::due).min()
    }

    pub fn on_timer(&mut self, now: Instant, out: &mut Vec<Effect>) {
        let ids: Vec<u64> =
            self.connections.iter().filter(|(_, c)| c.due() <= now).map(|(id, _)| *id).collect();
        for id in ids {
            let connection = self.connections.get_mut(&id).expect("it is due");
            match now >= connection.heard + IDLE {
                true => self.lose(id),
                false => connection.retry(now, id, out),
            }
        }
    }

    pub fn on_datagram(
        &mut self,
        now: Instant,
        from: NodeIndex,
        bytes: &[u8],
        out: &mut Vec<Effect>,
    ) {
        let Ok(Packet { connection: id, body }) = wire::decode::<Packet, 65_536>(bytes) else {
            return;
        };
        let opens = matches!(body, Body::Data { opens: true, .. }) && !self.lost.contains(&id);
        if opens && !self.connections.contains_key(&id) {
            self.connections.insert(id, Connection::new(now, from, false));
        }
        let Some(connection) = self.connections.get_mut(&id).filter(|c| c.peer == from) else {
            if !matches!(body, Body::Unknown) {
                send(out, id, from, Body::Unknown);
            }
            return;
        };
        (connection.heard, connection.answered) = (now, true);
        match body {
            Body::Unknown => self.lose(id),
            Body::Ping => send(out, id, from, Body::Pong),
            Body::Pong => {}
            Body::Data { number, sequence, item, .. } => {
                if let Some(event) = connection.on_data(id, number, (sequence, item), out) {
                    self.events.push_back(event);
                }
            }
            Body::Ack { number, received, consumed } => {
                connection.on_ack(now, id, number, (received, consumed), out);
            }
            Body::Probe { number } => connection.confirm(id, number, out),
            Body::Reset { number } => {
                connection.open_up_to(number);
                let stream = StreamRef { connection: id, number };
                if connection.streams.remove(&number).is_some() {
                    self.events.push_back(StreamEvent::Broken { stream });
                }
                send(out, id, from, Body::Gone { number });
            }
            Body::Gone { number } => {
                connection.resets.remove(&number);
                // It has got everything that was sent.
                if let Some(side) =
                    connection.streams.get_mut(&number).and_then(|s| s.send.as_mut())
                {
                    (side.ended, side.retry) = (true, None);
                    side.queue.clear();
                    connection.remove_if_over(number);
                }
            }
        }
    }

    fn push(&mut self, now: Instant, stream: StreamRef, item: Item, out: &mut Vec<Effect>) {
        let Some(connection) = self.connections.get_mut(&stream.connection) else { return };
        let side = connection.streams.get_mut(&stream.number).and_then(|s| s.send.as_mut());
        let Some(side) = side.filter(|side| !side.ended) else { return };
        side.ended = item == Item::End;
        side.queue.push_back(item);
        connection.transmit(now, stream.connection, stream.number, out);
    }

    fn lose(&mut self, id: u64) {
        let Some(connection) = self.connections.remove(&id) else { return };
        self.lost.insert(id);
        if self.dialled.get(&connection.peer) == Some(&id) {
            self.dialled.remove(&connection.peer);
        }
        let broken = connection.streams.into_keys();
        let broken = broken.map(|number| StreamRef { connection: id, number });
        self.events.extend(broken.map(|stream| StreamEvent::Broken { stream }));
    }
}

impl Connection {
    fn new(now: Instant, peer: NodeIndex, dialler: bool) -> Self {
        Connection {
            peer,
            dialler,
            answered: false,
            streams: BTreeMap::new(),
            resets: BTreeMap::new(),
            next: [0, 1, 2, 3],
            heard: now,
            pinged: now,
        }
    }

    fn open_own(&mut self, one_way: bool) -> u32 {
        let class = u32::from(!self.dialler) | u32::from(one_way) << 1;
        let number = self.next[class as usize];
        self.next[class as usize] += 4;
        let receive = (!one_way).then(ReceiveSide::default);
        self.streams.insert(number, Stream { send: Some(SendSide::default()), receive });
        number
    }

    /// Opens all streams of the peer up to that one, as QUIC does; an earlier one's data may be late.
    fn open_up_to(&mut self, number: u32) {
        let (class, one_way) = (number & 3, number & 2 != 0);
        let peers = (class & 1 == 0) != self.dialler;
        while peers && self.next[class as usize] <= number {
            let opened = self.next[class as usize];
            let send = (!one_way).then(SendSide::default);
            let stream = Stream { send, receive: Some(ReceiveSide::default()) };
            self.streams.insert(opened, stream);
            self.next[class as usize] += 4;
        }
    }

    fn on_data(
        &mut self,
        id: u64,
        number: u32,
        (sequence, item): (u32, Item),
        out: &mut Vec<Effect>,
    ) -> Option<StreamEvent> {
        self.open_up_to(number);
        let side = self.streams.get_mut(&number).and_then(|s| s.receive.as_mut());
        let mut event = None;
        if let Some(side) = side {
            let window = side.consumed..side.consumed + WINDOW;
            if sequence >= side.received && window.contains(&sequence) {
                side.early.insert(sequence, item);
            }
            while side.early.contains_key(&side.received) {
                side.received += 1;
            }
            if side.early.contains_key(&side.consumed) {
                let stream = StreamRef { connection: id, number };
                event = Some(StreamEvent::Readable { stream, peer: self.peer });
            }
        }
        self.confirm(id, number, out);
        event
    }

    /// Says what of a stream has arrived, or that it is over.
    fn confirm(&mut self, id: u64, number: u32, out: &mut Vec<Effect>) {
        if self.resets.contains_key(&number) {
            return;
        }
        let body = match self.streams.get_mut(&number).map(|s| s.receive.as_mut()) {
            Some(Some(side)) => {
                side.told = side.consumed;
                Body::Ack { number, received: side.received, consumed: side.consumed }
            }
            Some(None) => return,
            None => Body::Gone { number },
        };
        send(out, id, self.peer, body);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        id: u64,
        number: u32,
        (received, consumed): (u32, u32),
        out: &mut Vec<Effect>,
    ) {
        let side = self.streams.get_mut(&number).and_then(|s| s.send.as_mut());
        let Some(side) = side else { return };
        let known = (received.saturating_sub(side.base) as usize).min(side.queue.len());
        side.queue.drain(..known);
        side.base += known as u32;
        side.sent = side.sent.max(side.base);
        side.consumed = side.consumed.max(consumed);
        if known > 0 {
            side.retry = (!side.queue.is_empty()).then(|| Retry::first(now));
        }
        self.transmit(now, id, number, out);
        self.remove_if_over(number);
    }

    /// Sends what the window allows and was not sent yet.
    fn transmit(&mut self, now: Instant, id: u64, number: u32, out: &mut Vec<Effect>) {
        let (peer, opens) = (self.peer, self.dialler && !self.answered);
        let side = self.streams.get_mut(&number).and_then(|s| s.send.as_mut());
        let Some(side) = side else { return };
        let end = (side.base + side.queue.len() as u32).min(side.consumed + WINDOW);
        while side.sent < end {
            let item = side.queue[(side.sent - side.base) as usize].clone();
            send(out, id, peer, Body::Data { number, sequence: side.sent, opens, item });
            side.sent += 1;
        }
        if side.retry.is_none() && !side.queue.is_empty() {
            side.retry = Some(Retry::first(now));
        }
    }

    fn retry(&mut self, now: Instant, id: u64, out: &mut Vec<Effect>) {
        for (number, retry) in &mut self.resets {
            if retry.is_due(now) {
                send(out, id, self.peer, Body::Reset { number: *number });
            }
        }
        for (number, stream) in &mut self.streams {
            let Some(side) = &mut stream.send else { continue };
            if !side.retry.as_mut().is_some_and(|retry| retry.is_due(now)) {
                continue;
            }
            if side.sent == side.base {
                send(out, id, self.peer, Body::Probe { number: *number });
            }
            for sequence in side.base..side.sent {
                let item = side.queue[(sequence - side.base) as usize].clone();
                let (number, opens) = (*number, self.dialler && !self.answered);
                send(out, id, self.peer, Body::Data { number, sequence, opens, item });
            }
        }
        if now >= self.pinged + PING {
            self.pinged = now;
            if !self.streams.is_empty() {
                send(out, id, self.peer, Body::Ping);
            }
        }
    }

    fn remove_if_over(&mut self, number: u32) {
        let Some(stream) = self.streams.get(&number) else { return };
        let sent = stream.send.as_ref().is_none_or(|s| s.ended && s.queue.is_empty());
        if sent && stream.receive.as_ref().is_none_or(|r| r.ended) {
            self.streams.remove(&number);
        }
    }

    fn due(&self) -> Instant {
        let sides = self.streams.values().filter_map(|s| s.send.as_ref()?.retry);
        let retries = self.resets.values().copied().chain(sides).map(|retry| retry.at);
        let quiet = (self.pinged + PING).min(self.heard + IDLE);
        retries.min().map_or(quiet, |at| at.min(quiet))
    }
}

impl Retry {
    fn first(now: Instant) -> Self {
        Retry { at: now + RETRY, wait: RETRY }
    }

    /// Whether it is; then the next one is twice as far.
    fn is_due(&mut self, now: Instant) -> bool {
        let due = now >= self.at;
        if due {
            self.wait = (self.wait * 2).min(RETRY_MAX);
            self.at = now + self.wait;
        }
        due
    }
}

fn send(out: &mut Vec<Effect>, connection: u64, to: NodeIndex, body: Body) {
    out.push(Effect::Send { to, bytes: wire::encode(&Packet { connection, body }) });
}

/// Messages that may be under way or unread on one stream.
const WINDOW: u32 = 8;
/// A connection that hears nothing for so long is lost.
const IDLE: Duration = Duration::from_secs(3);
const PING: Duration = Duration::from_millis(800);
const RETRY: Duration = Duration::from_millis(60);
const RETRY_MAX: Duration = Duration::from_millis(500);
