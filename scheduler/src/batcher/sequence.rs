//! One sequence between its submission and its last word.

use std::cmp::Reverse;

use cache::{BlockId, BlockPool, Committed, HashChain};
use protocol::{Instant, SequenceId, TenantId, TokenId};

use super::{SequenceKind, Submission};
use crate::LogitsWanted;

/// Order of a sequence among those that run: higher priority first, then the one that came first.
pub(super) type Rank = (Reverse<i8>, u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Holds no blocks.
    Waiting,
    /// Has blocks; more than the last token is uncomputed, or was when it started.
    Prefill,
    /// One uncomputed token: the one sampled last.
    Decode,
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub id: SequenceId,
    pub tenant: TenantId,
    /// Of the submission.
    pub priority: i8,
    /// `priority`, or that of a sequence which waits for this one's blocks.
    pub effective_priority: i8,
    /// Order of arrival, kept over preemptions.
    pub ticket: u64,
    pub deadline: Option<Instant>,
    pub kind: SequenceKind,
    /// Prompt and what was generated.
    pub tokens: Vec<TokenId>,
    pub prompt_tokens: usize,
    /// `tokens` ends here at the latest.
    pub tokens_max: usize,
    /// Names of its blocks; none if it shares nothing.
    pub chain: Option<HashChain>,
    pub phase: Phase,
    /// Whether it has run before.
    pub started: bool,
    pub blocks: Vec<BlockId>,
    /// Tokens whose keys and values are in `blocks`.
    pub computed: usize,
    /// Tokens after `computed` in the step that is being written or in flight.
    pub planned: usize,
    /// Blocks that have their name in the pool.
    pub committed: usize,
    /// Blocks before this may be claimed in the pool.
    pub claimed: usize,
    /// While waiting: blocks before this were ready when last looked at.
    pub ready_hint: usize,
    /// Its last word has been said; what it holds is freed when the step in flight is done.
    pub dropped: bool,
}

impl Sequence {
    pub fn new(submission: Submission, ticket: u64, tokens_max: usize, chain: HashChain) -> Self {
        let needs_rows = matches!(submission.kind, SequenceKind::Embed | SequenceKind::Score);
        let shares = submission.reuse_prefix && !needs_rows;
        let prompt_tokens = submission.tokens.len();
        let mut sequence = Sequence {
            id: submission.sequence,
            tenant: submission.tenant,
            priority: submission.priority,
            effective_priority: submission.priority,
            ticket,
            deadline: submission.deadline,
            kind: submission.kind,
            tokens_max: prompt_tokens.saturating_add(submission.max_new_tokens).min(tokens_max),
            prompt_tokens,
            tokens: submission.tokens,
            chain: shares.then_some(chain),
            phase: Phase::Waiting,
            started: false,
            blocks: Vec::new(),
            computed: 0,
            planned: 0,
            committed: 0,
            claimed: 0,
            ready_hint: 0,
            dropped: false,
        };
        sequence.name_blocks();
        sequence
    }

    pub fn rank(&self) -> Rank {
        (Reverse(self.effective_priority), self.ticket)
    }

    /// Blocks that may come from the cache: all full ones before the last token, which is computed in
    /// any case because its logits are wanted.
    pub fn reusable_blocks(&self, block_tokens: usize) -> usize {
        match self.chain {
            Some(_) => (self.tokens.len() - 1) / block_tokens,
            None => 0,
        }
    }

    pub fn wanted(&self) -> LogitsWanted {
        match self.kind {
            SequenceKind::Embed => LogitsWanted::Hidden,
            SequenceKind::Score => LogitsWanted::All,
            SequenceKind::Prefill => LogitsWanted::None,
            SequenceKind::Generate if self.computed + self.planned == self.tokens.len() => {
                LogitsWanted::Last
            }
            SequenceKind::Generate => LogitsWanted::None,
        }
    }

    /// Claims every named block from the first that is not in the cache.
    pub fn claim(&mut self, pool: &mut BlockPool) {
        let Some(chain) = &self.chain else { return };
        for hash in &chain.hashes()[self.committed..] {
            pool.claim(hash, self.id);
        }
        self.claimed = chain.hashes().len();
    }

    /// Gives names to the blocks that are full by now: what they hold has been computed.
    pub fn commit(&mut self, pool: &mut BlockPool, block_tokens: usize) {
        self.name_blocks();
        let Some(chain) = &self.chain else { return };
        while (self.committed + 1) * block_tokens <= self.computed {
            let hash = chain.hashes()[self.committed];
            let block = &mut self.blocks[self.committed];
            if let Committed::Replaced(canonical) = pool.commit(*block, hash, self.id) {
                *block = canonical;
            }
            self.committed += 1;
        }
    }

    /// Gives back every block and claim; what was computed is forgotten, except by the cache.
    pub fn release(&mut self, pool: &mut BlockPool) {
        if let Some(chain) = &self.chain {
            for hash in chain.hashes().get(self.committed..self.claimed).unwrap_or(&[]) {
                pool.unclaim(hash, self.id);
            }
        }
        for block in self.blocks.drain(..).rev() {
            pool.release(block);
        }
        (self.computed, self.planned, self.committed, self.claimed) = (0, 0, 0, 0);
        self.ready_hint = 0;
    }

    fn name_blocks(&mut self) {
        if let Some(chain) = &mut self.chain {
            chain.extend(&self.tokens);
        }
    }
}
