//! The side that decodes, and leads.

use std::collections::BTreeMap;

use protocol::frame::{Frame, Kind};
use protocol::transfer::{
    self, KV_BLOCKS_MAX, KV_STREAMS_MAX, KV_TOKENS_MAX, KvAsk, KvChunk, KvCommit, KvEnd,
    KvFirstToken, KvFrameError, KvProgress, KvRefusal, KvStream, KvWork,
};
use protocol::{Duration, Instant, Machine, NodeId, RequestId, TenantId, TokenId};

use super::{BlockDigest, TransferConfig};
use crate::{BlockHash, BlockId};

/// One attempt to get blocks from one peer: a control stream and at most one data stream. No number
/// comes twice from one receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptId(pub u64);

/// A data stream as the receiver's shell calls it; no number is used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u64);

/// Blocks that a request needs and this node has not.
#[derive(Clone, Debug)]
pub struct HandOff {
    /// No other hand-off of this request is in flight.
    pub request: RequestId,
    /// Position in the sequence of the first missing block.
    pub first: u32,
    /// Names of the missing blocks, in order: all from `first` to the last full block of the prompt.
    pub missing: Vec<BlockHash>,
    pub prompt: Prompt,
    /// Who is asked, one after the other; at most `SOURCES_MAX`.
    pub sources: Vec<Source>,
    /// Then the receiver goes on alone.
    pub deadline: Instant,
}

/// What a sender needs to prefill.
#[derive(Clone, Debug)]
pub struct Prompt {
    pub tenant: TenantId,
    pub tokens: Vec<TokenId>,
    pub priority: i8,
    pub first_token: KvFirstToken,
}

/// A peer that may have the blocks, or can compute them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    pub peer: NodeId,
    /// Whether it shall prefill what it has not; if not, it sends what it has.
    pub prefill: bool,
    /// Data streams that the path to it is worth, 1 to `KV_STREAMS_MAX`.
    pub streams: u8,
}

/// What a receiver is told.
#[derive(Clone, Debug)]
pub enum ReceiverInput {
    Start(HandOff),
    /// The answer to `Reserve`: as many blocks as asked for, or none if there is no room.
    Reserved {
        request: RequestId,
        blocks: Vec<BlockId>,
    },
    /// A frame on the control stream of that attempt.
    Control {
        attempt: AttemptId,
        frame: Frame,
    },
    /// The control stream could not be opened, or ended, was reset, or went down with its connection.
    ControlClosed {
        attempt: AttemptId,
    },
    /// A frame on a data stream that `peer` has opened, which stands for those that its payloads are
    /// dealt out to. After `KV_CHUNK` the shell reads payloads, if
    /// it is told to `Write`, before the next frame.
    Data {
        stream: StreamId,
        peer: NodeId,
        frame: Frame,
    },
    /// The payloads of a `Write` are in their pages, and this is what they are.
    Written {
        stream: StreamId,
        digests: Vec<BlockDigest>,
    },
    /// A `Write` was not done to its end, and nobody writes into its pages any more.
    WriteStopped {
        stream: StreamId,
    },
    /// The data stream ended, was reset, or went down with its connection. If a `Write` was under way,
    /// `WriteStopped` comes first.
    DataClosed {
        stream: StreamId,
    },
    /// The request is not wanted any more.
    Cancel {
        request: RequestId,
    },
    Timer,
}

/// What its shell must do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReceiverOutput {
    /// Take that many blocks out of the pool, for the receiver to hold.
    Reserve { request: RequestId, blocks: usize },
    /// Open a control stream to the peer and send this.
    Ask { attempt: AttemptId, peer: NodeId, frame: Frame },
    /// Read the payloads that follow on the stream into these pages, and digest each under its name.
    /// Answer `Written` or `WriteStopped`, always and once: until then the pages belong to the writer.
    Write { stream: StreamId, blocks: Vec<BlockId>, names: Vec<BlockHash> },
    /// Read no more of this stream and tell its sender so. A `Write` under way ends early.
    Stop { stream: StreamId },
    /// These are whole and verified: name them in the pool. From now on they are the caller's to release.
    Attach { request: RequestId, blocks: Vec<(BlockId, BlockHash)> },
    /// Release these: nothing reads them, and nothing writes into them any more.
    Free { blocks: Vec<BlockId> },
    /// End the control stream: if `done`, finish it, else reset it.
    Close { attempt: AttemptId, done: bool },
    /// An attempt is over; for logs, metrics and the router.
    Attempted { request: RequestId, attempt: AttemptId, peer: NodeId, error: AttemptError },
    /// Nothing more comes for this request. The first `verified` of the missing blocks are attached; the
    /// caller prefills the others.
    Ended { request: RequestId, verified: usize, outcome: HandOffOutcome },
}

/// How a hand-off ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandOffOutcome {
    /// Every block is there. `first_token` is the sender's, if it was asked for; `cached` of the last
    /// sender's blocks were there before it was asked, as far as it has said.
    Complete {
        first_token: Option<TokenId>,
        cached: u32,
    },
    /// The last source failed, too.
    Incomplete(AttemptError),
    /// There was no room for the blocks; nobody was asked.
    NoRoom,
    Deadline,
    Cancelled,
    /// Nothing was begun.
    Rejected(Rejection),
}

/// Why a hand-off was not begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    #[error("{max} hand-offs are in flight, no more are allowed")]
    Busy { max: usize },
    #[error("a hand-off of this request is in flight already")]
    Twice,
    #[error("{blocks} blocks are asked for, 1 to {max} are allowed")]
    Blocks { blocks: usize, max: usize },
    #[error("{sources} peers are named, 1 to {SOURCES_MAX} are allowed")]
    Sources { sources: usize },
    #[error("the prompt has {tokens} tokens, at most {KV_TOKENS_MAX} can be sent")]
    Tokens { tokens: usize },
}

/// Why an attempt brought no more blocks. Those that were committed before stay.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttemptError {
    #[error("refused: {0}")]
    Refused(KvRefusal),
    /// It has sent all that it has.
    #[error("it has no more blocks")]
    Exhausted,
    #[error("no answer in time")]
    Unanswered,
    #[error("no sign of life in time")]
    Silent,
    #[error("the stream ended early")]
    Lost,
    #[error("the payload of block {block} is not what its digest says")]
    Corrupt { block: u32 },
    #[error("it broke the protocol: {0}")]
    Violation(#[from] Violation),
}

impl AttemptError {
    /// Whether the peer did what no sound one does: for whoever counts faults of peers.
    pub fn is_misbehaviour(&self) -> bool {
        matches!(self, AttemptError::Corrupt { .. } | AttemptError::Violation(_))
    }
}

/// What no honest peer sends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error(transparent)]
    Frame(#[from] KvFrameError),
    #[error("a frame of kind {kind} out of its turn")]
    Unexpected { kind: u16 },
    #[error("blocks {first} to {end} are not what comes next")]
    OutOfRange { first: u32, end: u64 },
}

/// The decoding side of all hand-offs of one replica.
#[derive(Debug)]
pub struct Receiver {
    config: TransferConfig,
    attempts: u64,
    /// At most `transfers_max`, together with `orphans`.
    active: BTreeMap<RequestId, Active>,
    /// The one live attempt of each request.
    live: BTreeMap<AttemptId, RequestId>,
    /// The one data stream of each live attempt, and streams whose writer must stop first.
    streams: BTreeMap<StreamId, RequestId>,
    /// Pages of ended hand-offs that are still being written.
    orphans: BTreeMap<StreamId, Vec<BlockId>>,
}

#[derive(Debug)]
struct Active {
    handoff: HandOff,
    /// One for each missing block; those before `verified` are the caller's.
    pages: Vec<BlockId>,
    verified: usize,
    /// The source of the next attempt.
    source: usize,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    Reserving,
    Live(Attempt),
    /// The writer of the attempt before must stop before its pages are written again.
    Draining {
        stream: StreamId,
        chunk: Chunk,
        error: AttemptError,
    },
}

#[derive(Debug)]
struct Attempt {
    id: AttemptId,
    peer: NodeId,
    /// Missing blocks that were verified when it began: number 0 on its wire.
    base: usize,
    /// Data streams that it may have.
    streams: u8,
    /// There is a first token to wait for when all blocks are there.
    wants_token: bool,
    accepted: bool,
    heard: Instant,
    stream: Option<StreamId>,
    /// Announced and not committed.
    chunk: Option<Chunk>,
}

/// Missing blocks `first .. first + blocks`.
#[derive(Clone, Debug)]
struct Chunk {
    first: usize,
    blocks: usize,
    /// Once they are written.
    digests: Option<Vec<BlockDigest>>,
}

impl Receiver {
    pub fn new(config: TransferConfig) -> Self {
        Receiver::counting_from(config, 0)
    }

    /// A receiver whose attempts are numbered from `first`: one beside others of the same process.
    pub fn counting_from(config: TransferConfig, first: u64) -> Self {
        Receiver {
            config,
            attempts: first,
            active: BTreeMap::new(),
            live: BTreeMap::new(),
            streams: BTreeMap::new(),
            orphans: BTreeMap::new(),
        }
    }

    /// Hand-offs in flight, and ended ones whose writer has not stopped yet.
    pub fn in_flight(&self) -> usize {
        self.active.len() + self.orphans.len()
    }

    fn start(&mut self, now: Instant, handoff: HandOff, out: &mut Vec<ReceiverOutput>) {
        let request = handoff.request;
        if let Err(rejection) = self.check(&handoff) {
            let outcome = HandOffOutcome::Rejected(rejection);
            out.push(ReceiverOutput::Ended { request, verified: 0, outcome });
            return;
        }
        if now >= handoff.deadline {
            let outcome = HandOffOutcome::Deadline;
            out.push(ReceiverOutput::Ended { request, verified: 0, outcome });
            return;
        }
        out.push(ReceiverOutput::Reserve { request, blocks: handoff.missing.len() });
        let (pages, phase) = (Vec::new(), Phase::Reserving);
        self.active.insert(request, Active { handoff, pages, verified: 0, source: 0, phase });
    }

    fn check(&self, handoff: &HandOff) -> Result<(), Rejection> {
        let (max, blocks) = (self.config.blocks_max.min(KV_BLOCKS_MAX), handoff.missing.len());
        if !(1..=max).contains(&blocks) {
            return Err(Rejection::Blocks { blocks, max });
        }
        let sources = handoff.sources.len();
        if !(1..=SOURCES_MAX).contains(&sources) {
            return Err(Rejection::Sources { sources });
        }
        let tokens = handoff.prompt.tokens.len();
        let prefills = handoff.sources.iter().any(|source| source.prefill);
        if prefills && !(1..=KV_TOKENS_MAX).contains(&tokens) {
            return Err(Rejection::Tokens { tokens });
        }
        if self.active.contains_key(&handoff.request) {
            return Err(Rejection::Twice);
        }
        match self.config.transfers_max {
            max if self.in_flight() >= max => Err(Rejection::Busy { max }),
            _ => Ok(()),
        }
    }

    fn on_reserved(
        &mut self,
        now: Instant,
        request: RequestId,
        blocks: Vec<BlockId>,
        out: &mut Vec<ReceiverOutput>,
    ) {
        match self.active.get_mut(&request) {
            Some(active) if matches!(active.phase, Phase::Reserving) => {
                if blocks.is_empty() {
                    self.end(request, HandOffOutcome::NoRoom, out);
                } else if blocks.len() == active.handoff.missing.len() {
                    active.pages = blocks;
                    self.ask(now, request, out);
                } else {
                    // The answer to a hand-off of the same request that was cancelled meanwhile.
                    out.push(ReceiverOutput::Free { blocks });
                }
            }
            _ if blocks.is_empty() => {}
            _ => out.push(ReceiverOutput::Free { blocks }),
        }
    }

    /// Begins the next attempt, at the first block that is not verified.
    fn ask(&mut self, now: Instant, request: RequestId, out: &mut Vec<ReceiverOutput>) {
        let id = AttemptId(self.attempts);
        self.attempts += 1;
        let active = self.active.get_mut(&request).expect("asked for what is in flight");
        let Active { handoff, verified, .. } = &*active;
        let Source { peer, prefill, streams } = handoff.sources[active.source];
        let streams = streams.clamp(1, KV_STREAMS_MAX as u8);
        let prompt = &handoff.prompt;
        let work = match prefill {
            false => KvWork::Cached,
            true => KvWork::Prefill {
                tenant: prompt.tenant.as_str().to_owned(),
                tokens: prompt.tokens.clone(),
                priority: prompt.priority,
                first_token: prompt.first_token,
            },
        };
        let wants_token = prefill && prompt.first_token != KvFirstToken::Receiver;
        let left_ms = handoff.deadline.saturating_since(now).as_millis();
        let ask = KvAsk {
            request: request.0,
            attempt: id.0,
            format: self.config.format,
            first: handoff.first.saturating_add(*verified as u32),
            wanted: handoff.missing[*verified..].iter().map(|name| name.0).collect(),
            deadline_ms: u32::try_from(left_ms).unwrap_or(u32::MAX),
            streams,
            work,
        };
        let frame = Frame::new(Kind::KV_ASK, &ask);
        active.source += 1;
        active.phase = Phase::Live(Attempt {
            id,
            peer,
            base: active.verified,
            streams,
            wants_token,
            accepted: false,
            heard: now,
            stream: None,
            chunk: None,
        });
        self.live.insert(id, request);
        out.push(ReceiverOutput::Ask { attempt: id, peer, frame });
    }

    /// The live attempt of that number, with its request.
    fn attempt(&mut self, id: AttemptId) -> Option<(RequestId, &mut Attempt)> {
        let request = *self.live.get(&id)?;
        match &mut self.active.get_mut(&request)?.phase {
            Phase::Live(attempt) => Some((request, attempt)),
            Phase::Reserving | Phase::Draining { .. } => None,
        }
    }

    fn on_control(
        &mut self,
        now: Instant,
        id: AttemptId,
        frame: &Frame,
        out: &mut Vec<ReceiverOutput>,
    ) {
        let Some((request, attempt)) = self.attempt(id) else { return };
        attempt.heard = now;
        if let Err(error) = heard_control(attempt, frame) {
            self.fail(now, request, error, out);
        }
    }

    fn on_data(
        &mut self,
        now: Instant,
        (stream, peer): (StreamId, NodeId),
        frame: &Frame,
        out: &mut Vec<ReceiverOutput>,
    ) {
        let Some(&request) = self.streams.get(&stream) else {
            match self.adopt(now, (stream, peer), frame) {
                true => return,
                false => return out.push(ReceiverOutput::Stop { stream }),
            }
        };
        if frame.kind.is_optional() {
            return;
        }
        let active = self.active.get_mut(&request).expect("its stream is known");
        let Phase::Live(attempt) = &mut active.phase else { return };
        attempt.heard = now;
        let handled = match frame.kind {
            Kind::KV_CHUNK => self.on_chunk(request, frame, out),
            Kind::KV_COMMIT => self.on_commit(request, frame, out),
            Kind(kind) => Err(Violation::Unexpected { kind }.into()),
        };
        if let Err(error) = handled {
            self.fail(now, request, error, out);
        }
    }

    /// Whether the first frame of a stream says that it belongs to the live attempt of its request, and
    /// it is the only one.
    fn adopt(&mut self, now: Instant, (stream, peer): (StreamId, NodeId), frame: &Frame) -> bool {
        let Ok(header) = KvStream::from_frame(frame) else { return false };
        let Some((request, attempt)) = self.attempt(AttemptId(header.attempt)) else {
            return false;
        };
        let is_its_own = attempt.peer == peer && request.0 == header.request;
        if !is_its_own || attempt.stream.is_some() || header.parts > attempt.streams {
            return false;
        }
        (attempt.stream, attempt.heard) = (Some(stream), now);
        self.streams.insert(stream, request);
        true
    }

    fn on_chunk(
        &mut self,
        request: RequestId,
        frame: &Frame,
        out: &mut Vec<ReceiverOutput>,
    ) -> Result<(), AttemptError> {
        let active = self.active.get_mut(&request).expect("its stream is known");
        let Phase::Live(attempt) = &mut active.phase else { return Ok(()) };
        let KvChunk { first, blocks } = KvChunk::from_frame(frame).map_err(Violation::from)?;
        if attempt.chunk.is_some() {
            return Err(Violation::Unexpected { kind: frame.kind.0 }.into());
        }
        let (from, n) = (active.verified, blocks as usize);
        let left = active.handoff.missing.len() - from;
        if first as usize != from - attempt.base || n > left {
            let end = u64::from(first) + u64::from(blocks);
            return Err(Violation::OutOfRange { first, end }.into());
        }
        attempt.chunk = Some(Chunk { first: from, blocks: n, digests: None });
        let stream = attempt.stream.expect("the frame came on it");
        let blocks = active.pages[from..from + n].to_vec();
        let names = active.handoff.missing[from..from + n].to_vec();
        out.push(ReceiverOutput::Write { stream, blocks, names });
        Ok(())
    }

    fn on_commit(
        &mut self,
        request: RequestId,
        frame: &Frame,
        out: &mut Vec<ReceiverOutput>,
    ) -> Result<(), AttemptError> {
        let active = self.active.get_mut(&request).expect("its stream is known");
        let Phase::Live(attempt) = &mut active.phase else { return Ok(()) };
        let commit = KvCommit::from_frame(frame).map_err(Violation::from)?;
        let unexpected = AttemptError::from(Violation::Unexpected { kind: frame.kind.0 });
        let written = match attempt.chunk.take() {
            None => Vec::new(),
            Some(Chunk { digests: Some(digests), .. }) => digests,
            // The shell does not read on before it has written; this keeps its pages the writer's.
            unwritten @ Some(_) => {
                attempt.chunk = unwritten;
                return Err(unexpected);
            }
        };
        let (from, n, wants_token) = (active.verified, written.len(), attempt.wants_token);
        if commit.digests.len() != n || commit.first as usize != from - attempt.base {
            return Err(unexpected);
        }
        let differs = |(ours, theirs): (&BlockDigest, &[u8; 32])| ours.0 != *theirs;
        if let Some(bad) = written.iter().zip(&commit.digests).position(differs) {
            return Err(AttemptError::Corrupt { block: commit.first + bad as u32 });
        }
        if n > 0 {
            let pages = active.pages[from..from + n].iter().copied();
            let blocks = pages.zip(active.handoff.missing[from..].iter().copied()).collect();
            out.push(ReceiverOutput::Attach { request, blocks });
            active.verified += n;
        }
        let KvEnd { first_token, cached } = match commit.end {
            Some(_) if active.verified < active.handoff.missing.len() => {
                return Err(AttemptError::Exhausted);
            }
            Some(end) => end,
            None if active.verified < active.handoff.missing.len() || wants_token => return Ok(()),
            None => KvEnd { first_token: None, cached: 0 },
        };
        self.end(request, HandOffOutcome::Complete { first_token, cached }, out);
        Ok(())
    }

    /// The writer of that stream has ended, with these digests if it came to its end.
    fn on_writer_ended(
        &mut self,
        now: Instant,
        stream: StreamId,
        digests: Option<Vec<BlockDigest>>,
        out: &mut Vec<ReceiverOutput>,
    ) {
        if let Some(blocks) = self.orphans.remove(&stream) {
            return out.push(ReceiverOutput::Free { blocks });
        }
        let Some(&request) = self.streams.get(&stream) else { return };
        let active = self.active.get_mut(&request).expect("its stream is known");
        match &mut active.phase {
            Phase::Reserving => {}
            Phase::Draining { error, .. } => {
                let error = error.clone();
                self.streams.remove(&stream);
                self.go_on(now, request, error, out);
            }
            Phase::Live(attempt) => {
                let Some(chunk) = &mut attempt.chunk else { return };
                match digests {
                    Some(digests) => {
                        assert_eq!(digests.len(), chunk.blocks, "a digest for each block");
                        (chunk.digests, attempt.heard) = (Some(digests), now);
                    }
                    None => {
                        attempt.chunk = None;
                        self.fail(now, request, AttemptError::Lost, out);
                    }
                }
            }
        }
    }

    /// Ends the live attempt; goes on with the next source or ends the hand-off.
    fn fail(
        &mut self,
        now: Instant,
        request: RequestId,
        error: AttemptError,
        out: &mut Vec<ReceiverOutput>,
    ) {
        // It has done what it could: that is no failure of the stream.
        let done = error == AttemptError::Exhausted;
        let unwritten = self.close(request, done, Some(&error), out);
        let active = self.active.get_mut(&request).expect("it has a live attempt");
        match unwritten {
            Some((stream, chunk)) if active.source < active.handoff.sources.len() => {
                self.streams.insert(stream, request);
                active.phase = Phase::Draining { stream, chunk, error };
            }
            Some((stream, chunk)) => {
                active.phase = Phase::Draining { stream, chunk, error: error.clone() };
                self.end(request, HandOffOutcome::Incomplete(error), out);
            }
            None => self.go_on(now, request, error, out),
        }
    }

    fn go_on(
        &mut self,
        now: Instant,
        request: RequestId,
        error: AttemptError,
        out: &mut Vec<ReceiverOutput>,
    ) {
        let active = self.active.get_mut(&request).expect("it goes on");
        // A phase without streams, whatever comes next.
        active.phase = Phase::Reserving;
        if active.verified == active.handoff.missing.len()
            || active.source >= active.handoff.sources.len()
        {
            self.end(request, HandOffOutcome::Incomplete(error), out);
        } else {
            self.ask(now, request, out);
        }
    }

    /// Closes both streams of the live attempt, if there is one. What its writer still writes, if
    /// anything.
    fn close(
        &mut self,
        request: RequestId,
        done: bool,
        error: Option<&AttemptError>,
        out: &mut Vec<ReceiverOutput>,
    ) -> Option<(StreamId, Chunk)> {
        let active = self.active.get_mut(&request)?;
        let Phase::Live(attempt) = &mut active.phase else { return None };
        let (id, peer) = (attempt.id, attempt.peer);
        let (stream, chunk) = (attempt.stream, attempt.chunk.take());
        self.live.remove(&id);
        out.push(ReceiverOutput::Close { attempt: id, done });
        if let Some(stream) = stream {
            self.streams.remove(&stream);
            if !done {
                out.push(ReceiverOutput::Stop { stream });
            }
        }
        if let Some(error) = error.cloned() {
            out.push(ReceiverOutput::Attempted { request, attempt: id, peer, error });
        }
        stream.zip(chunk.filter(|chunk| chunk.digests.is_none()))
    }

    /// Says the last word on a hand-off and frees what was not attached, at once but for what is being
    /// written.
    fn end(&mut self, request: RequestId, outcome: HandOffOutcome, out: &mut Vec<ReceiverOutput>) {
        let done = matches!(outcome, HandOffOutcome::Complete { .. });
        let unwritten = self.close(request, done, None, out);
        let Some(mut active) = self.active.remove(&request) else { return };
        let unwritten = match active.phase {
            Phase::Draining { stream, chunk, .. } => {
                self.streams.remove(&stream);
                Some((stream, chunk))
            }
            Phase::Reserving | Phase::Live(_) => unwritten,
        };
        if let Some((stream, Chunk { first, blocks, .. })) = unwritten {
            let written = active.pages.drain(first..first + blocks).collect();
            self.orphans.insert(stream, written);
        }
        let verified = active.verified;
        let blocks = active.pages.split_off(verified.min(active.pages.len()));
        if !blocks.is_empty() {
            out.push(ReceiverOutput::Free { blocks });
        }
        out.push(ReceiverOutput::Ended { request, verified, outcome });
    }

    fn on_timer(&mut self, now: Instant, out: &mut Vec<ReceiverOutput>) {
        let due: Vec<RequestId> = self
            .active
            .iter()
            .filter(|(_, active)| self.due(active) <= now)
            .map(|(request, _)| *request)
            .collect();
        for request in due {
            let late = now.saturating_since(self.due(&self.active[&request]));
            let active = self.active.get_mut(&request).expect("it is due");
            match &mut active.phase {
                _ if now >= active.handoff.deadline => {
                    self.end(request, HandOffOutcome::Deadline, out);
                }
                // This node slept, not the peer: what it said meanwhile is still to be read.
                Phase::Live(attempt) if late >= OWN_STALL => attempt.heard = now,
                Phase::Live(attempt) => {
                    let error = match attempt.accepted {
                        true => AttemptError::Silent,
                        false => AttemptError::Unanswered,
                    };
                    self.fail(now, request, error, out);
                }
                Phase::Reserving | Phase::Draining { .. } => {}
            }
        }
    }

    /// When the next wait of a hand-off ends.
    fn due(&self, active: &Active) -> Instant {
        let deadline = active.handoff.deadline;
        match &active.phase {
            Phase::Reserving | Phase::Draining { .. } => deadline,
            Phase::Live(Attempt { accepted: true, heard, .. }) => {
                deadline.min(*heard + self.config.silence_max)
            }
            Phase::Live(attempt) => deadline.min(attempt.heard + self.config.answer_wait),
        }
    }
}

impl Machine for Receiver {
    type Input = ReceiverInput;
    type Output = ReceiverOutput;

    fn handle(&mut self, now: Instant, input: ReceiverInput, out: &mut Vec<ReceiverOutput>) {
        match input {
            ReceiverInput::Start(handoff) => self.start(now, handoff, out),
            ReceiverInput::Reserved { request, blocks } => {
                self.on_reserved(now, request, blocks, out);
            }
            ReceiverInput::Control { attempt, frame } => {
                self.on_control(now, attempt, &frame, out);
            }
            ReceiverInput::ControlClosed { attempt } => {
                if let Some((request, _)) = self.attempt(attempt) {
                    self.fail(now, request, AttemptError::Lost, out);
                }
            }
            ReceiverInput::Data { stream, peer, frame } => {
                self.on_data(now, (stream, peer), &frame, out);
            }
            ReceiverInput::Written { stream, digests } => {
                self.on_writer_ended(now, stream, Some(digests), out);
            }
            ReceiverInput::WriteStopped { stream } => {
                self.on_writer_ended(now, stream, None, out);
            }
            ReceiverInput::DataClosed { stream } => {
                let Some(&request) = self.streams.get(&stream) else { return };
                if matches!(self.active[&request].phase, Phase::Live(_)) {
                    self.fail(now, request, AttemptError::Lost, out);
                }
            }
            ReceiverInput::Cancel { request } => {
                self.end(request, HandOffOutcome::Cancelled, out);
            }
            ReceiverInput::Timer => self.on_timer(now, out),
        }
    }

    /// O(hand-offs in flight).
    fn next_deadline(&self) -> Option<Instant> {
        self.active.values().map(|active| self.due(active)).min()
    }
}

fn heard_control(attempt: &mut Attempt, frame: &Frame) -> Result<(), AttemptError> {
    let unexpected = || Violation::Unexpected { kind: frame.kind.0 }.into();
    match frame.kind {
        kind if kind.is_optional() => Ok(()),
        Kind::KV_ACCEPT if !attempt.accepted => {
            transfer::value::<()>(frame, Kind::KV_ACCEPT).map_err(Violation::from)?;
            attempt.accepted = true;
            Ok(())
        }
        Kind::KV_PROGRESS if attempt.accepted => {
            transfer::value::<KvProgress>(frame, Kind::KV_PROGRESS).map_err(Violation::from)?;
            Ok(())
        }
        Kind::KV_REFUSAL => {
            let refusal = transfer::value(frame, Kind::KV_REFUSAL).map_err(Violation::from)?;
            Err(AttemptError::Refused(refusal))
        }
        _ => Err(unexpected()),
    }
}

/// A timer that comes so much too late was kept from running, as membership has it, too.
const OWN_STALL: Duration = Duration::from_millis(200);

/// Peers that one hand-off may try.
pub const SOURCES_MAX: usize = 8;
