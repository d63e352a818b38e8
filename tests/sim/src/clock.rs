//! A node's own clock: an offset and a drift against the world's time. It never goes backwards, as
//! monotonic clocks do not.

use protocol::Instant;

#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// Where the two times were last tied together.
    world: u64,
    own: u64,
    drift_ppm: i64,
}

impl Clock {
    /// A clock that shows `own` at the world's `world`.
    pub fn new(world: u64, own: u64) -> Self {
        Clock { world, own, drift_ppm: 0 }
    }

    /// From now on that much faster (or slower) than the world. At least -900,000.
    pub fn set_drift(&mut self, world: u64, drift_ppm: i64) {
        *self = Clock { world, own: self.at(world).as_nanos(), drift_ppm: drift_ppm.max(-900_000) };
    }

    /// What the clock shows.
    pub fn at(&self, world: u64) -> Instant {
        let elapsed = i128::from(world.saturating_sub(self.world));
        let own = elapsed * i128::from(MILLION + self.drift_ppm) / i128::from(MILLION);
        Instant::from_nanos(self.own.saturating_add(own as u64))
    }

    /// The world's time when the clock will show `own`, or a moment later.
    pub fn world_at(&self, own: Instant) -> u64 {
        let elapsed = i128::from(own.as_nanos().saturating_sub(self.own));
        let world = elapsed * i128::from(MILLION) / i128::from(MILLION + self.drift_ppm);
        self.world.saturating_add(world as u64) + u64::from(self.drift_ppm != 0)
    }
}

const MILLION: i64 = 1_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for drift in [0, 200, -200, 100_000, -500_000] {
            let mut clock = Clock::new(5, 1000);
            clock.set_drift(10, drift);
            for own in [2_000, 1_000_003, 7_777_777_777] {
                let at = clock.at(clock.world_at(Instant::from_nanos(own))).as_nanos();
                assert!((own..own + 3).contains(&at), "{drift} {own} {at}");
            }
        }
    }
}
