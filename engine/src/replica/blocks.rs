//! Blocks from and for other nodes: what the machines of [`cache::transfer`] want of the pool and of the
//! bytes, and prefills that peers have asked for.
//!
//! Between steps only, so that no page is copied while it is computed.

use std::collections::BTreeMap;

use cache::transfer::{Served, TransferId};
use cache::{BlockHash, BlockId, NameChange, Namer};
use kernels::attention::KvDtype;
use protocol::transfer::{KvDtype as WireDtype, KvFormat, KvRefusal, KvWork};
use protocol::{Instant, RequestId, SequenceId, TenantId, TokenId};
use scheduler::{SequenceKind, Submission};

use super::request::RequestError;
use super::{Job, Replica, Work};
use crate::executor::BlockWriteError;

/// What became of a [`Replica::serve`], for the sender's machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServeEvent {
    /// The next of the wanted blocks, pinned until [`Replica::release_blocks`].
    Ready { transfer: TransferId, blocks: Vec<BlockId> },
    /// No more will come. The first `cached` blocks were here before they were asked for.
    Finished { transfer: TransferId, cached: usize },
    /// No more will come, and not because that was all.
    Declined { transfer: TransferId, refusal: KvRefusal },
}

/// Hand-offs to this replica and from it.
#[derive(Default)]
pub(super) struct Transfers {
    incoming: BTreeMap<RequestId, Incoming>,
    serving: BTreeMap<TransferId, Serving>,
    /// Transfers for which nothing more comes up from below the pool.
    pub raised: Vec<TransferId>,
    events: Vec<ServeEvent>,
}

struct Incoming {
    /// Claims the names in the pool.
    owner: SequenceId,
    names: Vec<BlockHash>,
    /// References on what has come.
    kept: Vec<BlockId>,
}

struct Serving {
    names: Vec<BlockHash>,
    pinned: usize,
    /// Of them, those that nobody had to compute for this.
    cached: usize,
    /// What is to be computed once all that lies below the pool has come up.
    prompt: Option<(TenantId, Vec<TokenId>, i8)>,
    sequence: Option<SequenceId>,
}

impl Replica {
    /// What this replica's blocks are.
    pub fn kv_format(&self) -> KvFormat {
        let layout = self.executor.kv_layout();
        let narrow = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        KvFormat {
            identity: *self.batcher.config().identity.as_bytes(),
            layer_first: 0,
            layers: narrow(layout.layers),
            block_tokens: narrow(layout.block_tokens),
            dtype: match layout.dtype {
                KvDtype::F32 => WireDtype::F32,
                KvDtype::F16 => WireDtype::F16,
                KvDtype::Bf16 => WireDtype::Bf16,
            },
            block_bytes: u32::try_from(layout.block_bytes()).unwrap_or(u32::MAX),
        }
    }

    /// What names this replica's blocks.
    pub fn namer(&self) -> Namer {
        let config = self.batcher.config();
        Namer::new(self.secret, config.identity, config.block_tokens)
    }

    /// From now on [`take_name_changes`](Self::take_name_changes) says which blocks can be had here, in
    /// the pool or from below it.
    pub fn watch_names(&mut self) {
        self.batcher.watch_names();
        self.watch_below();
    }

    /// Names stored and removed since the last call, in order.
    pub fn take_name_changes(&mut self) -> Vec<NameChange> {
        let changes = self.batcher.take_name_changes();
        self.with_changes_below(changes)
    }

    /// How many of the names, from the first on, are here, in the pool or below it, or being computed
    /// here.
    pub fn blocks_known(&self, names: &[BlockHash]) -> usize {
        let known = self.batcher.blocks_known(names);
        known + self.blocks_below(&names[known..])
    }

    /// How many of [`blocks_known`](Self::blocks_known), the last of them, lie below the pool.
    pub fn blocks_known_below(&self, names: &[BlockHash]) -> usize {
        self.blocks_below(&names[self.batcher.blocks_known(names)..])
    }

    /// A request will get these blocks from elsewhere: others that want them wait until
    /// [`end_hand_off`](Self::end_hand_off).
    pub fn begin_hand_off(&mut self, request: RequestId, names: Vec<BlockHash>) {
        self.end_hand_off(request);
        let owner = SequenceId(self.next_sequence);
        self.next_sequence += 1;
        self.batcher.claim_blocks(&names, owner);
        self.transfers.incoming.insert(request, Incoming { owner, names, kept: Vec::new() });
    }

    /// Room for `n` blocks, or none.
    pub fn reserve_blocks(&mut self, n: usize) -> Vec<BlockId> {
        self.batcher.reserve_blocks(n)
    }

    /// Fills a reserved block with a payload that comes in pieces.
    ///
    /// # Errors
    /// If the pieces are not a block's payload together.
    pub fn write_block<P: AsRef<[u8]>>(
        &mut self,
        block: BlockId,
        pieces: &[P],
    ) -> Result<(), BlockWriteError> {
        self.spill();
        self.executor.write_block_pieces(block, pieces)
    }

    /// The payload of a block; `None` beyond the capacity.
    pub fn block_payload(&self, block: BlockId) -> Option<&[u8]> {
        self.executor.block_payload(block)
    }

    /// Names reserved blocks that are written and verified. They stay referenced for the request until
    /// [`end_hand_off`](Self::end_hand_off).
    pub fn attach_blocks(&mut self, request: RequestId, blocks: &[(BlockId, BlockHash)]) {
        let attached = self.batcher.attach_blocks(blocks);
        match self.transfers.incoming.get_mut(&request) {
            Some(incoming) => incoming.kept.extend(attached),
            None => self.batcher.release_blocks(&attached),
        }
    }

    /// Gives back reserved blocks that were not attached, and pins.
    pub fn release_blocks(&mut self, blocks: &[BlockId]) {
        self.batcher.release_blocks(blocks);
    }

    /// Nothing more comes for the request from elsewhere. Say so after its sequence is submitted: until
    /// then what has come cannot be evicted.
    pub fn end_hand_off(&mut self, request: RequestId) {
        if let Some(Incoming { owner, names, kept }) = self.transfers.incoming.remove(&request) {
            self.batcher.unclaim_blocks(&names, owner);
            self.batcher.release_blocks(&kept);
        }
    }

    /// Pins what a peer wants, brings up what lies below the pool, and computes the rest if it asks for
    /// that; see [`ServeEvent`].
    pub fn serve(&mut self, now: Instant, transfer: TransferId, served: Served) {
        let Served { first, names, work, .. } = served;
        let prompt = match work {
            KvWork::Cached => None,
            KvWork::Prefill { tenant, tokens, priority, .. } => {
                match self.prefill_prompt(first as usize, &names, tenant, tokens) {
                    Ok((tenant, tokens)) => Some((tenant, tokens, priority)),
                    Err(refusal) => return self.decline(transfer, refusal),
                }
            }
        };
        let serving =
            Serving { names: names.clone(), pinned: 0, cached: 0, prompt, sequence: None };
        self.transfers.serving.insert(transfer, serving);
        self.pin_ready(transfer);
        let pinned = self.transfers.serving.get(&transfer).map_or(0, |serving| serving.pinned);
        if !self.bring_up_for(now, transfer, &names[pinned..]) {
            self.serve_rest(now, transfer);
        }
        self.go_on_serving(now);
    }

    /// Goes on with transfers for which all has come up that there was.
    pub(super) fn go_on_serving(&mut self, now: Instant) {
        for transfer in std::mem::take(&mut self.transfers.raised) {
            self.serve_rest(now, transfer);
        }
    }

    /// Computes what is missing, or ends it there.
    fn serve_rest(&mut self, now: Instant, transfer: TransferId) {
        let complete = self.pin_ready(transfer);
        let Some(serving) = self.transfers.serving.get_mut(&transfer) else { return };
        serving.cached = serving.pinned;
        match serving.prompt.take() {
            Some((tenant, tokens, priority)) if !complete => {
                if let Err(refusal) = self.prefill(now, transfer, (tenant, tokens), priority) {
                    self.decline(transfer, refusal);
                }
            }
            _ => self.finish_serving(transfer),
        }
    }

    /// Nobody wants it any more. Blocks that were `Ready` stay pinned until they are released.
    pub fn unserve(&mut self, now: Instant, transfer: TransferId) {
        self.stop_bringing_up(now, transfer);
        let serving = self.transfers.serving.remove(&transfer);
        if let Some(sequence) = serving.and_then(|serving| serving.sequence) {
            self.cancel_sequence(now, sequence);
        }
    }

    /// What has become of what is served, in order.
    pub fn take_serve_events(&mut self) -> Vec<ServeEvent> {
        std::mem::take(&mut self.transfers.events)
    }

    /// Looks after every step for blocks that it has filled.
    pub(super) fn pin_all_ready(&mut self) {
        let serving: Vec<TransferId> = self.transfers.serving.keys().copied().collect();
        for transfer in serving {
            self.pin_ready(transfer);
        }
    }

    /// The prefill for a transfer is over.
    pub(super) fn prefilled(&mut self, transfer: TransferId, error: Option<RequestError>) {
        match error {
            None => {
                self.pin_ready(transfer);
                self.finish_serving(transfer);
            }
            Some(RequestError::QueueFull { .. }) => self.decline(transfer, KvRefusal::Busy),
            Some(_) => self.decline(transfer, KvRefusal::Aborted),
        }
    }

    /// The tokens up to the last wanted block, if their names are those that are wanted.
    fn prefill_prompt(
        &self,
        first: usize,
        names: &[BlockHash],
        tenant: String,
        mut tokens: Vec<TokenId>,
    ) -> Result<(TenantId, Vec<TokenId>), KvRefusal> {
        let tenant = TenantId::new(&tenant).ok_or(KvRefusal::Protocol)?;
        let end = first.checked_add(names.len()).ok_or(KvRefusal::Protocol)?;
        if self.check_tokens(&tokens).is_err() {
            return Err(KvRefusal::Protocol);
        }
        tokens.truncate(end.saturating_mul(self.batcher.config().block_tokens));
        match self.namer().names(&tenant, &tokens).get(first..end) {
            Some(ours) if ours == names => Ok((tenant, tokens)),
            _ => Err(KvRefusal::OtherNames),
        }
    }

    fn prefill(
        &mut self,
        now: Instant,
        transfer: TransferId,
        (tenant, tokens): (TenantId, Vec<TokenId>),
        priority: i8,
    ) -> Result<(), KvRefusal> {
        let submission = Submission {
            kind: SequenceKind::Prefill,
            priority,
            reuse_prefix: true,
            ..self.submission(&tenant, tokens)
        };
        let sequence = SequenceId(self.next_sequence);
        let job = Job { choice: 0, work: Work::Prefill(transfer), submission };
        match self.submit(now, NOBODY, vec![job]) {
            Ok(()) => {
                if let Some(serving) = self.transfers.serving.get_mut(&transfer) {
                    serving.sequence = Some(sequence);
                }
                Ok(())
            }
            Err(RequestError::QueueFull { .. }) => Err(KvRefusal::Busy),
            Err(_) => Err(KvRefusal::Aborted),
        }
    }

    /// Pins the blocks that follow those pinned already. True if that is all.
    fn pin_ready(&mut self, transfer: TransferId) -> bool {
        let Some(serving) = self.transfers.serving.get_mut(&transfer) else { return true };
        let blocks = self.batcher.pin_blocks(&serving.names[serving.pinned..]);
        serving.pinned += blocks.len();
        let complete = serving.pinned == serving.names.len();
        if !blocks.is_empty() {
            self.transfers.events.push(ServeEvent::Ready { transfer, blocks });
        }
        complete
    }

    fn finish_serving(&mut self, transfer: TransferId) {
        if let Some(Serving { cached, .. }) = self.transfers.serving.remove(&transfer) {
            self.transfers.events.push(ServeEvent::Finished { transfer, cached });
        }
    }

    fn decline(&mut self, transfer: TransferId, refusal: KvRefusal) {
        self.transfers.serving.remove(&transfer);
        self.transfers.events.push(ServeEvent::Declined { transfer, refusal });
    }
}

/// Prefills for peers belong to no request of this replica: cancelling one must not end them.
const NOBODY: RequestId = RequestId(0);
