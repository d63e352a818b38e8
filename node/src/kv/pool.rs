//! The way from the transfers of a model to its replica's pool and pages.
//!
//! Commands are done between steps, in their order; what has an answer gets it as a [`PoolEvent`]. The queue has no bound
//! of its own: the machines bound what is under way, and who asks in vain waits for its answer.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use cache::transfer::{BlockDigest, Served, StreamId, TransferId};
use cache::{BlockHash, BlockId, NameChange};
use engine::replica::{Replica, ServeEvent};
use protocol::transfer::KvRefusal;
use protocol::{Instant, RequestId};
use tokio::sync::{mpsc, oneshot};

/// What a transfer wants of the replica.
#[derive(Debug)]
pub enum PoolCommand {
    /// How many of the names, from the first on, are there or being computed; and how many of these lie
    /// below the pool?
    Look {
        names: Vec<BlockHash>,
        reply: oneshot::Sender<(usize, usize)>,
    },
    /// Answered by `Named` whenever names have changed, from now on.
    Watch,
    /// These will come for the request: others that want them wait.
    Begin {
        request: RequestId,
        names: Vec<BlockHash>,
    },
    /// Answered by `Reserved`.
    Reserve {
        request: RequestId,
        blocks: usize,
    },
    /// Answered by `Written`. A payload comes in pieces.
    Write {
        stream: StreamId,
        blocks: Vec<BlockId>,
        names: Vec<BlockHash>,
        payloads: Vec<Vec<Bytes>>,
    },
    Attach {
        request: RequestId,
        blocks: Vec<(BlockId, BlockHash)>,
    },
    Release {
        blocks: Vec<BlockId>,
    },
    /// The sequence of the request is submitted, or never will be.
    End {
        request: RequestId,
    },
    /// Answered by `Served`, again and again.
    Serve {
        transfer: TransferId,
        served: Served,
    },
    Unserve {
        transfer: TransferId,
    },
    /// Answered by `Read`.
    Read {
        transfer: TransferId,
        blocks: Vec<BlockId>,
    },
}

/// What the replica answers.
#[derive(Debug)]
pub enum PoolEvent {
    Reserved {
        request: RequestId,
        blocks: Vec<BlockId>,
    },
    /// What the pages hold now; `None` if they were not written.
    Written {
        stream: StreamId,
        digests: Option<Vec<BlockDigest>>,
    },
    Ready {
        transfer: TransferId,
        blocks: Vec<BlockId>,
    },
    Finished {
        transfer: TransferId,
        cached: usize,
    },
    Declined {
        transfer: TransferId,
        refusal: KvRefusal,
    },
    /// Copies of the pages.
    Read {
        transfer: TransferId,
        payloads: Vec<Bytes>,
    },
    /// Blocks that can be had here now, or not any more; and, with tiers below the pool, those that it
    /// has and has not.
    Named {
        anywhere: Vec<NameChange>,
        in_pool: Vec<NameChange>,
    },
}

/// Commands that wait for the replica, and who hears its answers.
#[derive(Debug, Default)]
pub(crate) struct PoolQueue(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    commands: VecDeque<PoolCommand>,
    events: Option<mpsc::UnboundedSender<PoolEvent>>,
    closed: bool,
}

impl PoolQueue {
    /// Dropped once the replica has ended, with whatever awaits an answer in it.
    pub fn push(&self, command: PoolCommand) {
        let mut state = self.lock();
        if !state.closed {
            state.commands.push_back(command);
        }
    }

    pub fn pop(&self) -> Option<PoolCommand> {
        self.lock().commands.pop_front()
    }

    /// Who hears the answers from now on. The channel ends with the replica.
    pub fn listen(&self) -> mpsc::UnboundedReceiver<PoolEvent> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut state = self.lock();
        if !state.closed {
            state.events = Some(sender);
        }
        receiver
    }

    pub fn answer(&self, events: impl Iterator<Item = PoolEvent>) {
        let state = self.lock();
        let Some(listener) = &state.events else { return };
        for event in events {
            // Whoever listened is gone only when the node stops.
            let _ = listener.send(event);
        }
    }

    /// The replica has ended.
    pub fn close(&self) {
        *self.lock() = State { closed: true, ..State::default() };
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does what a command says.
pub(crate) fn execute(
    replica: &mut Replica,
    now: Instant,
    command: PoolCommand,
    events: &mut Vec<PoolEvent>,
) {
    match command {
        PoolCommand::Look { names, reply } => {
            // Whoever asked may have left.
            let _ = reply.send((replica.blocks_known(&names), replica.blocks_known_below(&names)));
        }
        PoolCommand::Watch => replica.watch_names(),
        PoolCommand::Begin { request, names } => replica.begin_hand_off(request, names),
        PoolCommand::Reserve { request, blocks } => {
            let blocks = replica.reserve_blocks(blocks);
            events.push(PoolEvent::Reserved { request, blocks });
        }
        PoolCommand::Write { stream, blocks, names, payloads } => {
            let pages = blocks.iter().zip(&payloads).zip(&names);
            let digests = pages.map(|((&block, pieces), name)| {
                replica.write_block(block, pieces).ok()?;
                // Of the page, not of what was sent: a page that was written wrongly is found, too.
                Some(BlockDigest::of(name, replica.block_payload(block)?))
            });
            events.push(PoolEvent::Written { stream, digests: digests.collect() });
        }
        PoolCommand::Attach { request, blocks } => replica.attach_blocks(request, &blocks),
        PoolCommand::Release { blocks } => replica.release_blocks(&blocks),
        PoolCommand::End { request } => replica.end_hand_off(request),
        PoolCommand::Serve { transfer, served } => replica.serve(now, transfer, served),
        PoolCommand::Unserve { transfer } => replica.unserve(now, transfer),
        PoolCommand::Read { transfer, blocks } => {
            let payload = |&block: &BlockId| replica.block_payload(block);
            let payloads = blocks.iter().filter_map(payload).map(Bytes::copy_from_slice).collect();
            events.push(PoolEvent::Read { transfer, payloads });
        }
    }
}

/// What has become of what the replica serves.
pub(crate) fn served(replica: &mut Replica, events: &mut Vec<PoolEvent>) {
    events.extend(replica.take_serve_events().into_iter().map(|event| match event {
        ServeEvent::Ready { transfer, blocks } => PoolEvent::Ready { transfer, blocks },
        ServeEvent::Finished { transfer, cached } => PoolEvent::Finished { transfer, cached },
        ServeEvent::Declined { transfer, refusal } => PoolEvent::Declined { transfer, refusal },
    }));
    let anywhere = replica.take_name_changes();
    let in_pool = replica.take_pool_changes();
    if !anywhere.is_empty() {
        events.push(PoolEvent::Named { anywhere, in_pool });
    }
}
