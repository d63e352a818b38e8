//! A replica: the daemon's batcher, and a clock in place of kernels.

use cache::{
    BLOCK_TOKENS_DEFAULT, BlockHash, BlockId, HashChain, IdentityParts, NumericalIdentity,
    TenantSalt,
};
use protocol::random::mix;
use protocol::{Instant, Machine, SequenceId, TenantId, TokenId};
use scheduler::router::ReplicaLoad;
use scheduler::{
    Batcher, BatcherConfig, BatcherInput, BatcherOutput, LogitsWanted, SequenceKind, StepPlan,
    StepResult, Submission,
};

pub struct Replica {
    batcher: Batcher,
    /// How fast it is against the others.
    speed: f64,
    plan: Option<StepPlan>,
    began_us: u64,
    pub busy_us: u64,
    /// Copies between two steps, which the next one comes after.
    copied_us: u64,
    /// A decoding step of late, microseconds.
    decode_step_us: u32,
}

/// What a client or the study has to know.
pub enum Happened {
    Started { cached_tokens: usize },
    Token { request: u64, token: TokenId },
    Ended { request: u64, refused: bool },
}

impl Replica {
    pub fn new(speed: f64) -> Replica {
        let mut config = BatcherConfig::new(BLOCKS, CONTEXT, identity());
        config.sequences_max = 32;
        Replica {
            batcher: Batcher::new(config).expect("a valid configuration"),
            speed,
            plan: None,
            began_us: 0,
            busy_us: 0,
            copied_us: 0,
            decode_step_us: 0,
        }
    }

    /// What the daemon would report.
    pub fn load(&self) -> ReplicaLoad {
        let stats = self.batcher.stats();
        ReplicaLoad {
            ready: true,
            running: stats.running as u32,
            waiting: stats.waiting as u32,
            prompt_tokens: stats.prompt_tokens_left,
            prefill_rate: stats.prompt_rate,
            decode_step_us: self.decode_step_us,
            kv_blocks_free: (stats.blocks_free + stats.blocks_cached) as u32,
            kv_blocks: BLOCKS,
            kv_bytes_per_token: KV_BYTES_PER_TOKEN,
            ..ReplicaLoad::default()
        }
    }

    pub fn is_computing(&self) -> bool {
        self.plan.is_some()
    }

    /// Names of a prompt's full blocks.
    pub fn names(&self, submission: &Submission) -> Vec<BlockHash> {
        let mut chain = HashChain::new(submission.salt, &identity(), BLOCK_TOKENS_DEFAULT);
        chain.extend(&submission.tokens);
        chain.hashes().to_vec()
    }

    pub fn blocks_known(&self, names: &[BlockHash]) -> usize {
        self.batcher.blocks_known(names)
    }

    pub fn pin(&mut self, names: &[BlockHash]) -> Vec<BlockId> {
        self.batcher.pin_blocks(names)
    }

    /// Room for these, which others wait for from now on; none if there is none.
    pub fn reserve(&mut self, names: &[BlockHash], owner: SequenceId) -> Vec<BlockId> {
        self.batcher.claim_blocks(names, owner);
        self.batcher.reserve_blocks(names.len())
    }

    pub fn attach(&mut self, blocks: &[(BlockId, BlockHash)]) -> Vec<BlockId> {
        self.batcher.attach_blocks(blocks)
    }

    pub fn release(&mut self, blocks: &[BlockId]) {
        self.batcher.release_blocks(blocks);
    }

    /// Nothing more comes; `kept` is what came.
    pub fn end_hand_off(&mut self, names: &[BlockHash], owner: SequenceId, kept: &[BlockId]) {
        self.batcher.unclaim_blocks(names, owner);
        self.batcher.release_blocks(kept);
    }

    /// The next step is that much later.
    pub fn copy(&mut self, micros: u64) {
        self.copied_us += micros;
    }

    pub fn submit(&mut self, now_us: u64, submission: Submission) -> Vec<Happened> {
        self.handle(now_us, BatcherInput::Submit(submission))
    }

    /// Begins a step unless one is under way; says when it will end.
    pub fn begin_step(&mut self, now_us: u64) -> (Option<u64>, Vec<Happened>) {
        if self.plan.is_some() {
            return (None, Vec::new());
        }
        let happened = self.handle(now_us, BatcherInput::Plan);
        let Some(plan) = &self.plan else { return (None, happened) };
        let prompts = plan.sequences.iter().filter(|step| step.tokens.len() > 1);
        let prompt_tokens: usize = prompts.map(|step| step.tokens.len()).sum();
        let decodes = plan.token_count() - prompt_tokens;
        let micros = STEP_US + PROMPT_TOKEN_US * prompt_tokens as f64 + DECODE_US * decodes as f64;
        self.began_us = now_us;
        let copied_us = std::mem::take(&mut self.copied_us);
        (Some(now_us + copied_us + (micros / self.speed) as u64), happened)
    }

    /// The step under way is computed.
    pub fn end_step(&mut self, now_us: u64) -> Vec<Happened> {
        let plan = self.plan.take().expect("a step is under way");
        let took = now_us - self.began_us;
        self.busy_us += took;
        if plan.sequences.iter().all(|step| step.tokens.len() == 1) {
            let before = u64::from(self.decode_step_us);
            let average = if before == 0 { took } else { (before * 7 + took) / 8 };
            self.decode_step_us = average as u32;
        }
        let mut happened = Vec::new();
        let mut results = Vec::new();
        for step in &plan.sequences {
            if step.wanted == LogitsWanted::Last {
                let place = (step.position + step.tokens.len()) as u64;
                let token = (mix(step.sequence.0 << 20 | place) % 30_000) as TokenId;
                happened.push(Happened::Token { request: step.sequence.0, token });
                let (sequence, token) = (step.sequence, Some(token));
                results.push(StepResult { sequence, token, finished: false });
            }
        }
        happened.extend(self.handle(now_us, BatcherInput::StepDone { results }));
        happened
    }

    fn handle(&mut self, now_us: u64, input: BatcherInput) -> Vec<Happened> {
        let mut out = Vec::new();
        self.batcher.handle(Instant::from_nanos(now_us * 1000), input, &mut out);
        let mut happened = Vec::new();
        for output in out {
            match output {
                BatcherOutput::Step(plan) => self.plan = Some(plan),
                BatcherOutput::Started { cached_tokens, .. } => {
                    happened.push(Happened::Started { cached_tokens });
                }
                BatcherOutput::Finished { sequence, .. } => {
                    happened.push(Happened::Ended { request: sequence.0, refused: false });
                }
                BatcherOutput::Dropped { sequence, .. } => {
                    happened.push(Happened::Ended { request: sequence.0, refused: true });
                }
                BatcherOutput::Preempted { .. } | BatcherOutput::Resumed { .. } => {}
            }
        }
        happened
    }
}

pub fn submission(
    sequence: SequenceId,
    tenant: TenantId,
    salt: TenantSalt,
    tokens: Vec<TokenId>,
    max_new_tokens: usize,
) -> Submission {
    Submission {
        sequence,
        tenant,
        salt,
        priority: 0,
        tokens,
        max_new_tokens,
        deadline: None,
        reuse_prefix: true,
        kind: SequenceKind::Generate,
    }
}

pub fn identity() -> NumericalIdentity {
    NumericalIdentity::new(&IdentityParts {
        weights: b"none",
        architecture: "clock",
        kv_dtype: "none",
        rope: "",
        adapter: "",
    })
}

/// As a model of half a billion weights in f16.
pub const KV_BYTES_PER_TOKEN: u32 = 12_288;
/// KV memory: 49,152 tokens.
pub const BLOCKS: u32 = 3072;
const CONTEXT: usize = 16_384;
/// A step reads the weights once, computes prompt tokens, and walks the cache of each stream.
const STEP_US: f64 = 15_000.0;
const PROMPT_TOKEN_US: f64 = 1_000.0;
const DECODE_US: f64 = 1_500.0;
