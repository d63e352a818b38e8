//! A replica whose steps take longer than they need.

use std::cell::Cell;
use std::time::Duration;

use engine::replica::{Event, Events, RequestError};
use protocol::transfer::KvFormat;
use protocol::{Instant, RequestId};

use crate::kv::{PoolCommand, PoolEvent};
use crate::replica::{Core, Stats, StepReport, Work};

/// For demonstrations and measurements: a model that answers in a twentieth of a second cannot be watched,
/// nor its node be killed in the middle of a sentence; and steps that wait leave a machine to many nodes.
pub struct Paced {
    pub core: Box<dyn Core>,
    pub pause: Duration,
}

impl Core for Paced {
    fn submit(&mut self, now: Instant, work: Work) -> Result<Vec<Event>, RequestError> {
        self.core.submit(now, work)
    }

    fn cancel(&mut self, now: Instant, request: RequestId) {
        self.core.cancel(now, request);
    }

    fn step(&mut self, clock: &dyn Fn() -> Instant, events: &mut Events) -> StepReport {
        // The core looks at the clock before a step and, if there was anything to compute, after it. So
        // what it measures of its steps is what others see of them.
        let looks = Cell::new(0);
        let clock = || {
            if looks.replace(looks.get() + 1) == 1 {
                std::thread::sleep(self.pause);
            }
            clock()
        };
        self.core.step(&clock, events)
    }

    fn stats(&self) -> Stats {
        self.core.stats()
    }

    fn kv_format(&self) -> Option<KvFormat> {
        self.core.kv_format()
    }

    fn pool(&mut self, now: Instant, command: PoolCommand, events: &mut Vec<PoolEvent>) {
        self.core.pool(now, command, events);
    }

    fn served(&mut self, events: &mut Vec<PoolEvent>) {
        self.core.served(events);
    }

    fn has_work(&self) -> bool {
        self.core.has_work()
    }

    fn idle(&mut self, now: Instant) -> bool {
        self.core.idle(now)
    }
}
