//! A circuit breaker: after failures in a row a node is left alone for a while, then tried once.

use protocol::{Duration, Instant};

use super::RouterConfig;

/// Closed (all well), open until a time, or on trial with one request under way.
#[derive(Clone, Debug)]
pub(super) struct Breaker {
    failures: u32,
    open_until: Option<Instant>,
    /// How long it opens the next time.
    next_open: Duration,
    open_min: Duration,
    /// A trial began then. It ends by its outcome; one that never comes ends after `open_min`.
    trial: Option<Instant>,
}

impl Breaker {
    pub fn new(config: &RouterConfig) -> Self {
        Breaker {
            failures: 0,
            open_until: None,
            next_open: config.open_min,
            open_min: config.open_min,
            trial: None,
        }
    }

    /// The node may be asked from then on.
    pub fn asked_from(&self) -> Instant {
        let Some(until) = self.open_until else { return Instant::ORIGIN };
        self.trial.map_or(until, |began| until.max(began + self.open_min))
    }

    pub fn is_open(&self, now: Instant) -> bool {
        self.asked_from() > now
    }

    /// A request was sent to the node.
    pub fn tried(&mut self, now: Instant) {
        if self.open_until.is_some() {
            self.trial = Some(now);
        }
    }

    pub fn succeeded(&mut self) {
        self.failures = 0;
        self.open_until = None;
        self.trial = None;
        self.next_open = self.open_min;
    }

    /// An attempt ended without saying whether the node is well.
    pub fn settled(&mut self) {
        self.trial = None;
    }

    /// `spread` makes routers that failed together try again apart.
    pub fn failed(&mut self, now: Instant, config: &RouterConfig, spread: u64) {
        self.failures = self.failures.saturating_add(1);
        let on_trial = self.trial.take().is_some();
        if !on_trial && self.failures < config.failures_to_open {
            return;
        }
        if !on_trial && self.is_open(now) {
            return;
        }
        // Up to a quarter more.
        let extra = self.next_open.as_micros() as u64 / 4 * (spread % 256) / 256;
        self.open_until = Some(now + self.next_open + Duration::from_micros(extra));
        self.next_open = (self.next_open * 2).min(config.open_max);
    }
}
