//! Where the time of a step goes.

use std::time::{Duration, Instant};

/// A part of the forward pass that is timed on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepOp {
    Embed,
    Norm,
    Qkv,
    Rope,
    KvWrite,
    Attention,
    AttentionOutput,
    Router,
    GateUp,
    Activation,
    Down,
    Head,
}

impl StepOp {
    pub const ALL: [StepOp; 12] = [
        StepOp::Embed,
        StepOp::Norm,
        StepOp::Qkv,
        StepOp::Rope,
        StepOp::KvWrite,
        StepOp::Attention,
        StepOp::AttentionOutput,
        StepOp::Router,
        StepOp::GateUp,
        StepOp::Activation,
        StepOp::Down,
        StepOp::Head,
    ];

    /// Stable name, for metrics and reports.
    pub fn name(self) -> &'static str {
        match self {
            StepOp::Embed => "embed",
            StepOp::Norm => "norm",
            StepOp::Qkv => "qkv",
            StepOp::Rope => "rope",
            StepOp::KvWrite => "kv_write",
            StepOp::Attention => "attention",
            StepOp::AttentionOutput => "attention_output",
            StepOp::Router => "router",
            StepOp::GateUp => "gate_up",
            StepOp::Activation => "activation",
            StepOp::Down => "down",
            StepOp::Head => "head",
        }
    }
}

/// Wall time by operation, summed over the steps since the last [`StepProfile::clear`].
#[derive(Clone, Debug, Default)]
pub struct StepProfile {
    enabled: bool,
    steps: u64,
    nanos: [u64; StepOp::ALL.len()],
    since: Option<Instant>,
}

impl StepProfile {
    /// A profile that reads no clock unless `enabled`.
    pub fn new(enabled: bool) -> Self {
        StepProfile { enabled, ..StepProfile::default() }
    }

    pub fn clear(&mut self) {
        *self = StepProfile::new(self.enabled);
    }

    pub fn steps(&self) -> u64 {
        self.steps
    }

    pub fn time(&self, op: StepOp) -> Duration {
        Duration::from_nanos(self.nanos[op as usize])
    }

    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.nanos.iter().sum())
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Starts the clock of a step.
    pub(super) fn begin(&mut self) {
        if self.enabled {
            self.steps += 1;
            self.since = Some(Instant::now());
        }
    }

    /// Books the time since the last call to `op`.
    pub(super) fn lap(&mut self, op: StepOp) {
        if let Some(since) = self.since {
            let now = Instant::now();
            let nanos = now.duration_since(since).as_nanos();
            self.nanos[op as usize] += u64::try_from(nanos).unwrap_or(u64::MAX);
            self.since = Some(now);
        }
    }
}
