//! A replica without a model: virtual time, a cost model in place of kernels, and an executor whose
//! "keys and values" are fingerprints of the prefix they stand for. It checks on every step what a
//! real executor has to trust.

use std::collections::{BTreeMap, BTreeSet};

use cache::{BlockId, IdentityParts, NumericalIdentity, TenantSalt};
use protocol::{Duration, Instant, Machine, SequenceId, TenantId, TokenId};
use scheduler::{
    Batcher, BatcherConfig, BatcherInput, BatcherOutput, DropReason, LogitsWanted, SequenceKind,
    StepPlan, StepResult, Submission,
};

pub struct Replica {
    pub batcher: Batcher,
    pub now: Instant,
    pub steps: u64,
    /// Everything that came out, with its time.
    pub transcript: Vec<(Instant, BatcherOutput)>,
    pub sequences: BTreeMap<SequenceId, Client>,
    /// Fingerprint of what each place of each block holds.
    places: Vec<Vec<u64>>,
    plan: Option<StepPlan>,
}

/// What is known about a sequence from outside.
pub struct Client {
    pub submission: Submission,
    pub generated: Vec<TokenId>,
    pub submitted_at: Instant,
    pub first_token_at: Option<Instant>,
    pub ended: Option<BatcherOutput>,
    started: bool,
    /// Tokens computed or cached, since it last got blocks.
    computed: Option<usize>,
    /// Tokens of its own that were computed, over all steps.
    pub tokens_computed: usize,
    pub preemptions: usize,
    table: Vec<BlockId>,
    fingerprints: Vec<u64>,
}

impl Replica {
    pub fn new(config: BatcherConfig) -> Self {
        Replica {
            places: vec![vec![0; config.block_tokens]; config.blocks as usize],
            batcher: Batcher::new(config).expect("a valid configuration"),
            now: Instant::ORIGIN,
            steps: 0,
            transcript: Vec::new(),
            sequences: BTreeMap::new(),
            plan: None,
        }
    }

    pub fn submit(&mut self, submission: Submission) {
        let id = submission.sequence;
        let client = Client {
            submission: submission.clone(),
            generated: Vec::new(),
            submitted_at: self.now,
            first_token_at: None,
            ended: None,
            started: false,
            computed: None,
            tokens_computed: 0,
            preemptions: 0,
            table: Vec::new(),
            fingerprints: Vec::new(),
        };
        assert!(self.sequences.insert(id, client).is_none());
        self.handle(BatcherInput::Submit(submission));
    }

    pub fn handle(&mut self, input: BatcherInput) {
        let mut out = Vec::new();
        self.batcher.handle(self.now, input, &mut out);
        let mut preempted = BTreeSet::new();
        for output in out {
            match &output {
                BatcherOutput::Preempted { sequence } => assert!(preempted.insert(*sequence)),
                BatcherOutput::Resumed { sequence, .. } => {
                    assert!(!preempted.contains(sequence), "{sequence} goes round in circles");
                }
                _ => {}
            }
            self.observe(&output);
            self.transcript.push((self.now, output));
        }
        let stats = self.batcher.stats();
        let blocks = stats.blocks_free + stats.blocks_cached + stats.blocks_used;
        assert_eq!(blocks, self.places.len(), "blocks are neither lost nor made");
    }

    /// Plans and begins a step; says how long it takes. `None` if there is nothing to compute.
    pub fn begin_step(&mut self) -> Option<Duration> {
        assert!(self.plan.is_none());
        self.handle(BatcherInput::Plan);
        let plan = self.plan.as_ref()?;
        let tokens = plan.token_count() as u32;
        assert!(tokens as usize <= self.batcher.config().tokens_per_step_max);
        assert!(plan.sequences.len() <= self.batcher.config().sequences_max);
        Some(STEP_COST + TOKEN_COST * tokens)
    }

    /// Computes the step begun and hands the results over.
    pub fn end_step(&mut self, stop: impl Fn(&Client) -> bool) {
        let plan = self.plan.take().expect("a step has begun");
        let mut results = Vec::new();
        self.execute(&plan);
        for step in &plan.sequences {
            let client = self.sequences.get_mut(&step.sequence).expect("submitted");
            if step.wanted == LogitsWanted::Last && client.ended.is_none() {
                let token = sample(*client.fingerprints.last().expect("a prompt has tokens"));
                client.generated.push(token);
                client.first_token_at.get_or_insert(self.now);
                let finished = stop(client);
                results.push(StepResult { sequence: step.sequence, token: Some(token), finished });
            }
        }
        self.steps += 1;
        self.handle(BatcherInput::StepDone { results });
    }

    /// The step begun breaks off: nobody knows what it has written.
    pub fn fail_step(&mut self) {
        let plan = self.plan.take().expect("a step has begun");
        self.execute(&plan);
        let block_tokens = self.batcher.config().block_tokens;
        for step in &plan.sequences {
            for at in (step.position..).take(step.tokens.len()) {
                let block = step.blocks[at / block_tokens];
                self.places[block.0 as usize][at % block_tokens] = GARBAGE;
            }
        }
        self.steps += 1;
        self.handle(BatcherInput::StepFailed);
    }

    /// Runs until nothing is left to do.
    pub fn run(&mut self) {
        while let Some(cost) = self.begin_step() {
            self.now = self.now + cost;
            self.end_step(|_| false);
        }
    }

    /// Every sequence has had its last word and every block is back.
    pub fn assert_quiescent(&self) {
        for (id, client) in &self.sequences {
            assert!(client.ended.is_some(), "{id} never ended");
        }
        let stats = self.batcher.stats();
        assert!(!self.batcher.has_work());
        assert_eq!((stats.blocks_used, stats.running, stats.waiting), (0, 0, 0));
        assert_eq!(self.batcher.next_deadline(), None);
    }

    fn observe(&mut self, output: &BatcherOutput) {
        match output {
            BatcherOutput::Step(plan) => {
                assert!(self.plan.is_none(), "one step at a time");
                self.plan = Some(plan.clone());
            }
            BatcherOutput::Started { sequence, cached_tokens }
            | BatcherOutput::Resumed { sequence, cached_tokens } => {
                let client = self.sequences.get_mut(sequence).expect("submitted");
                assert!(client.ended.is_none() && client.computed.is_none());
                client.computed = Some(*cached_tokens);
                client.started = true;
            }
            BatcherOutput::Preempted { sequence } => {
                let client = self.sequences.get_mut(sequence).expect("submitted");
                assert!(client.ended.is_none() && client.computed.is_some());
                client.computed = None;
                client.preemptions += 1;
                client.table.clear();
            }
            BatcherOutput::Finished { sequence, .. } | BatcherOutput::Dropped { sequence, .. } => {
                if let BatcherOutput::Dropped { reason: DropReason::QueueFull { .. }, .. } = output
                {
                    let waits = |c: &&Client| c.ended.is_none() && !c.started;
                    let others = self.sequences.values().filter(waits).count() - 1;
                    assert!(
                        others * 9 >= self.batcher.config().waiting_max * 8,
                        "the queue has room"
                    );
                }
                let in_step =
                    |plan: &StepPlan| plan.sequences.iter().any(|s| s.sequence == *sequence);
                let busy = self.plan.as_ref().is_some_and(in_step);
                let client = self.sequences.get_mut(sequence).expect("submitted");
                assert!(client.ended.is_none(), "{sequence} has two last words");
                client.ended = Some(output.clone());
                if !busy {
                    client.table.clear();
                }
            }
        }
    }

    fn execute(&mut self, plan: &StepPlan) {
        let block_tokens = self.batcher.config().block_tokens;
        for step in &plan.sequences {
            let client = self.sequences.get_mut(&step.sequence).expect("submitted");
            client.table.clone_from(&step.blocks);
        }
        let mut holders: BTreeMap<BlockId, usize> = BTreeMap::new();
        for client in self.sequences.values() {
            for &block in &client.table {
                *holders.entry(block).or_default() += 1;
            }
        }
        for step in &plan.sequences {
            let client = self.sequences.get_mut(&step.sequence).expect("submitted");
            client.check(step.position, &step.tokens);
            let end = step.position + step.tokens.len();
            for at in 0..end {
                let block = step.blocks[at / block_tokens];
                let place = &mut self.places[block.0 as usize][at % block_tokens];
                if at < step.position {
                    assert_eq!(*place, client.fingerprints[at], "{} reads {at}", step.sequence);
                } else {
                    assert_eq!(holders[&block], 1, "{} writes a shared block", step.sequence);
                    *place = client.fingerprints[at];
                }
            }
            if client.ended.is_some() {
                client.table.clear();
            }
        }
    }
}

impl Client {
    /// Positions follow on each other, and the tokens are the sequence's own.
    fn check(&mut self, position: usize, tokens: &[TokenId]) {
        assert_eq!(self.computed, Some(position), "each position once between preemptions");
        assert!(!tokens.is_empty());
        let end = position + tokens.len();
        self.computed = Some(end);
        self.tokens_computed += tokens.len();
        let prompt = &self.submission.tokens;
        let own = |at: usize| *prompt.get(at).unwrap_or_else(|| &self.generated[at - prompt.len()]);
        for (token, at) in tokens.iter().zip(position..) {
            assert_eq!(*token, own(at));
        }
        let seed = self.submission.tenant.as_str().bytes().fold(1, |h, b| mix(h, u64::from(b)));
        while self.fingerprints.len() < end {
            let at = self.fingerprints.len();
            let last = self.fingerprints.last().copied().unwrap_or(seed);
            self.fingerprints.push(mix(last, u64::from(own(at))));
        }
    }
}

/// A generator with a seed, so that a failing run can be run again (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0, 0)
    }

    /// Uniform in `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

pub fn identity() -> NumericalIdentity {
    NumericalIdentity::new(&IdentityParts {
        weights: b"none",
        architecture: "fingerprint",
        kv_dtype: "u64",
        rope: "",
        adapter: "",
    })
}

/// A usual submission, to be changed with struct update syntax.
pub fn submission(id: u64, tenant: &str, tokens: Vec<TokenId>, max_new: usize) -> Submission {
    let tenant = TenantId::new(tenant).expect("a valid name");
    Submission {
        sequence: SequenceId(id),
        salt: TenantSalt::derive(&[7; 32], &tenant),
        tenant,
        priority: 0,
        tokens,
        max_new_tokens: max_new,
        deadline: None,
        reuse_prefix: true,
        kind: SequenceKind::Generate,
    }
}

/// `n` tokens that depend on `text` alone.
pub fn tokens(text: u64, n: usize) -> Vec<TokenId> {
    let mut random = Random(text);
    (0..n).map(|_| random.below(1000) as TokenId).collect()
}

fn sample(fingerprint: u64) -> TokenId {
    (mix(fingerprint, 3) % 1000) as TokenId
}

fn mix(a: u64, b: u64) -> u64 {
    let mut z = a ^ b.wrapping_mul(0xff51_afd7_ed55_8ccd).wrapping_add(0x2545_f491_4f6c_dd1d);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

const GARBAGE: u64 = 0;

pub const STEP_COST: Duration = Duration::from_millis(10);
pub const TOKEN_COST: Duration = Duration::from_micros(200);
