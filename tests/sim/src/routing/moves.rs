//! Blocks from one replica to another, as the daemon moves them: who decodes asks, and both ends take part
//! between their steps only, a chunk at a time.

use std::collections::VecDeque;

use cache::transfer::TransferConfig;
use cache::{BLOCK_TOKENS_DEFAULT, BlockHash, BlockId};
use protocol::SequenceId;
use protocol::transfer::{KvDtype, KvFormat};
use scheduler::Submission;

use super::replica::KV_BYTES_PER_TOKEN;
use super::{Event, HOP_US, World};

/// A prompt whose blocks come from elsewhere, or may.
pub struct Move {
    node: usize,
    /// Until it is handed to its replica.
    submission: Option<Submission>,
    prompt_tokens: usize,
    /// All full blocks of the prompt; those before `known` are there.
    names: Vec<BlockHash>,
    known: usize,
    /// Who is asked.
    from: usize,
    began_us: u64,
    /// Pinned at the sender, and of them those that have left.
    pins: Vec<BlockId>,
    sent: usize,
    /// Taken out of the receiver's pool, and of them those that are filled.
    pages: Vec<BlockId>,
    filled: usize,
    kept: Vec<BlockId>,
}

/// What a replica does between two steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Job {
    /// The receiver says what it has; then it is planned.
    Look,
    /// It takes room for what is to come.
    Reserve,
    /// The sender pins what it has.
    Pin,
    /// The sender copies the next chunk from its pages.
    Read,
    /// The receiver copies a chunk to its pages.
    Write { blocks: usize },
}

/// Jobs that wait for the end of a step, and when a node's way out is free.
#[derive(Default)]
pub struct Between {
    jobs: VecDeque<(u64, Job)>,
    way_free_us: u64,
}

impl World {
    /// A turn that is to be answered by `node`.
    pub(super) fn begin(&mut self, request: u64, node: usize, submission: Submission) {
        let prompt_tokens = submission.tokens.len();
        // The last token is computed in any case.
        let full = prompt_tokens.saturating_sub(1) / BLOCK_TOKENS_DEFAULT;
        let mut names = self.replicas[node].names(&submission);
        names.truncate(full);
        let moving = Move {
            node,
            submission: Some(submission),
            prompt_tokens,
            names,
            known: 0,
            from: node,
            began_us: self.now_us,
            pins: Vec::new(),
            sent: 0,
            pages: Vec::new(),
            filled: 0,
            kept: Vec::new(),
        };
        self.moves.insert(request, moving);
        self.give(node, request, Job::Look);
    }

    /// For a replica to do before its next step; at once if it computes none.
    pub(super) fn give(&mut self, node: usize, request: u64, job: Job) {
        self.between[node].jobs.push_back((request, job));
        if !self.replicas[node].is_computing() {
            self.between_steps(node);
        }
    }

    /// Does what waits, and begins the next step.
    pub(super) fn between_steps(&mut self, node: usize) {
        while let Some((request, job)) = self.between[node].jobs.pop_front() {
            self.do_job(node, request, job);
        }
        self.go_on(node);
    }

    fn do_job(&mut self, node: usize, request: u64, job: Job) {
        match job {
            Job::Look => self.look(request),
            Job::Reserve => self.reserve(request),
            Job::Pin => {
                let moving = self.moves.get_mut(&request).expect("it is under way");
                moving.pins = self.replicas[node].pin(&moving.names[moving.known..]);
                // What it does not have is computed by who has asked.
                let missing = moving.pages.len() - moving.pins.len();
                let (receiver, unused) = (moving.node, moving.pages.split_off(moving.pins.len()));
                assert_eq!(unused.len(), missing);
                self.replicas[receiver].release(&unused);
                match self.moves[&request].pins.is_empty() {
                    true => self.after(HOP_US / 2, receiver, request, Job::Write { blocks: 0 }),
                    false => self.after(TASK_US, node, request, Job::Read),
                }
            }
            Job::Read => self.read(node, request),
            Job::Write { blocks } => self.write(request, blocks),
        }
    }

    fn look(&mut self, request: u64) {
        let now = self.now();
        let moving = self.moves.get_mut(&request).expect("it is under way");
        let replica = &self.replicas[moving.node];
        moving.known = replica.blocks_known(&moving.names);
        let (node, known) = (moving.node, moving.known);
        let known_tokens = known * BLOCK_TOKENS_DEFAULT;
        let lengths = (moving.prompt_tokens, known_tokens);
        let overlaps = self.directory.overlaps(self.now_us, &moving.names);
        let own = replica.load();
        let from = match known < moving.names.len() {
            true => {
                self.ingresses[node].plan_prefill(now, (node, own), request, lengths, &overlaps)
            }
            false => None,
        };
        let Some(from) = from else { return self.submit(request) };
        moving.from = from;
        self.after(TASK_US, node, request, Job::Reserve);
    }

    fn reserve(&mut self, request: u64) {
        let moving = self.moves.get_mut(&request).expect("it is under way");
        let (node, from) = (moving.node, moving.from);
        let missing = &moving.names[moving.known..];
        let owner = owner(request);
        moving.pages = self.replicas[node].reserve(missing, owner);
        match moving.pages.is_empty() {
            true => self.submit(request),
            false => self.after(TASK_US + HOP_US / 2, from, request, Job::Pin),
        }
    }

    fn read(&mut self, node: usize, request: u64) {
        let moving = self.moves.get_mut(&request).expect("it is under way");
        let blocks = (moving.pins.len() - moving.sent).min(chunk_blocks());
        let receiver = moving.node;
        let leaving = &moving.pins[moving.sent..moving.sent + blocks];
        self.replicas[node].release(leaving);
        self.replicas[node].copy(READ_US_PER_BLOCK * blocks as u64);
        moving.sent += blocks;
        let more = moving.sent < moving.pins.len();
        let way = &mut self.between[node].way_free_us;
        *way = (*way).max(self.now_us) + blocks as u64 * BLOCK_US;
        let left_us = *way - self.now_us;
        self.after(left_us + HOP_US / 2, receiver, request, Job::Write { blocks });
        if more {
            self.after(left_us + TASK_US, node, request, Job::Read);
        }
    }

    fn write(&mut self, request: u64, blocks: usize) {
        let moving = self.moves.get_mut(&request).expect("it is under way");
        let Move { node, known, filled, .. } = *moving;
        let replica = &mut self.replicas[node];
        let place = known + filled;
        let named = moving.pages[filled..filled + blocks]
            .iter()
            .copied()
            .zip(moving.names[place..place + blocks].iter().copied());
        moving.kept.extend(replica.attach(&named.collect::<Vec<_>>()));
        replica.copy(WRITE_US_PER_BLOCK * blocks as u64);
        moving.filled += blocks;
        if moving.filled < moving.pages.len() {
            return;
        }
        let (from, filled) = (moving.from, moving.filled);
        let (bytes, took_us) = (filled as u64 * BLOCK_BYTES, self.now_us - moving.began_us);
        let planned = moving.names.len() - known;
        self.result.moved_tokens += (filled * BLOCK_TOKENS_DEFAULT) as u64;
        self.result.moves += 1;
        if filled == planned {
            self.ingresses[node].carried(from, bytes, took_us);
        }
        self.submit(request);
    }

    /// Hands the prompt to its replica, which finds what has come.
    fn submit(&mut self, request: u64) {
        let Some(mut moving) = self.moves.remove(&request) else { return };
        let node = moving.node;
        let submission = moving.submission.take().expect("handed over once");
        let happened = self.replicas[node].submit(self.now_us, submission);
        let missing = &moving.names[moving.known..];
        self.replicas[node].end_hand_off(missing, owner(request), &moving.kept);
        self.happened(node, happened);
    }

    fn after(&mut self, micros: u64, node: usize, request: u64, job: Job) {
        self.plan(self.now_us + micros, Event::Job { node, request, job });
    }
}

/// A number that no sequence has.
fn owner(request: u64) -> SequenceId {
    SequenceId(1 << 40 | request)
}

/// As many as the daemon sends at once.
fn chunk_blocks() -> usize {
    let format = KvFormat {
        identity: [0; 32],
        layer_first: 0,
        layers: 24,
        block_tokens: BLOCK_TOKENS_DEFAULT as u16,
        dtype: KvDtype::F16,
        block_bytes: BLOCK_BYTES as u32,
    };
    TransferConfig::new(format, 0).chunk_bytes_max / BLOCK_BYTES as usize
}

const BLOCK_BYTES: u64 = KV_BYTES_PER_TOKEN as u64 * BLOCK_TOKENS_DEFAULT as u64;
/// On a gigabit less what protocols take.
const BLOCK_US: u64 = BLOCK_BYTES * 1_000_000 / 110_000_000;
/// From a replica's thread to a task and back.
const TASK_US: u64 = 100;
/// A copy; a copy and a digest. Measured for blocks of 192 KiB.
const READ_US_PER_BLOCK: u64 = 40;
const WRITE_US_PER_BLOCK: u64 = 120;
