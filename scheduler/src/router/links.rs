//! What the paths from this node to others can carry, as measured.

use protocol::Duration;

/// One path. What was not measured is `None`, and a stated guess stands in for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkFigures {
    pub rtt: Option<Duration>,
    /// Goodput of KV blocks, bytes per second.
    pub bytes_per_s: Option<u64>,
}

impl LinkFigures {
    /// The measured round trip, or [`RTT_GUESS`].
    pub fn rtt_or_guess(&self) -> Duration {
        self.rtt.unwrap_or(RTT_GUESS)
    }

    /// The measured goodput, or [`BYTES_PER_S_GUESS`].
    pub fn bytes_per_s_or_guess(&self) -> u64 {
        self.bytes_per_s.unwrap_or(BYTES_PER_S_GUESS).max(1)
    }

    /// So many bytes came over it within `took`, in which nothing but the path was waited for: a sender
    /// that still computes is no slow path. Less than [`SAMPLE_BYTES_MIN`] tells nothing.
    pub fn carried(&mut self, bytes: u64, took: Duration) {
        if bytes < SAMPLE_BYTES_MIN {
            return;
        }
        let flowing = took.saturating_sub(self.rtt.unwrap_or_default());
        let micros = flowing.max(took / 4).as_micros().max(1);
        let now = u64::try_from(u128::from(bytes) * 1_000_000 / micros).unwrap_or(u64::MAX);
        self.bytes_per_s = Some(match self.bytes_per_s {
            Some(before) => before - before / 4 + now / 4,
            None => now,
        });
    }

    /// Windows of so many bytes that must be on their way for the path to be full; at least one. A path
    /// that was measured through too few of them carries what they let through: so twice that, and twice
    /// again the next time, until more bring no more. What was not measured is guessed, but for a round
    /// trip: without one, one.
    pub fn windows(&self, window_bytes: u64) -> u64 {
        let rtt_us = self.rtt.map_or(0, |rtt| rtt.as_micros());
        let product = u128::from(self.bytes_per_s_or_guess()) * rtt_us / 1_000_000;
        let windows = (product * WINDOW_HEADROOM).div_ceil(u128::from(window_bytes.max(1)));
        u64::try_from(windows).unwrap_or(u64::MAX).max(1)
    }

    /// Between two others, seen from here: neither is farther from the other than the slower path says,
    /// and no faster. Wrong where the two sit side by side and this node is far off; who decodes knows
    /// better, and decides with its own figures.
    #[must_use]
    pub fn between(a: LinkFigures, b: LinkFigures) -> LinkFigures {
        let rtt = a.rtt.or(b.rtt).map(|_| a.rtt_or_guess().max(b.rtt_or_guess()));
        let slower = || a.bytes_per_s_or_guess().min(b.bytes_per_s_or_guess());
        LinkFigures { rtt, bytes_per_s: a.bytes_per_s.or(b.bytes_per_s).map(|_| slower()) }
    }
}

/// Of a path that nothing came over yet: a gigabit a second less what protocols take. Too high, and the
/// first transfer is slower than computing; too low, and there never is a first one.
pub const BYTES_PER_S_GUESS: u64 = 100_000_000;
/// Of a path without a connection: the handshake is to come.
pub const RTT_GUESS: Duration = Duration::from_millis(10);
/// Bytes on their way over what is on it on average. Too small: a path that is wider than it looks is
/// never found out. Too large: memory at both ends.
const WINDOW_HEADROOM: u128 = 2;
/// Less than this is about the round trip, not the goodput.
pub const SAMPLE_BYTES_MIN: u64 = 256 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_over_guessed() {
        let mut link = LinkFigures::default();
        assert_eq!(link.rtt_or_guess(), RTT_GUESS);
        assert_eq!(link.bytes_per_s_or_guess(), BYTES_PER_S_GUESS);
        link.rtt = Some(Duration::from_millis(20));
        link.carried(SAMPLE_BYTES_MIN - 1, Duration::from_millis(1));
        assert_eq!(link.bytes_per_s, None, "too little to tell");
        // 1 MB in 120 ms of which 20 are the way.
        link.carried(1_000_000, Duration::from_millis(120));
        assert_eq!(link.bytes_per_s, Some(10_000_000));
        for _ in 0..30 {
            link.carried(1_000_000, Duration::from_millis(70));
        }
        let later = link.bytes_per_s.unwrap();
        assert!((19_900_000..=20_000_000).contains(&later), "{later}");
    }

    #[test]
    fn windows_follow_the_path() {
        let mib = 1 << 20;
        let check = |rtt_ms: Option<u64>, bytes_per_s, expect| {
            let link = LinkFigures { rtt: rtt_ms.map(Duration::from_millis), bytes_per_s };
            assert_eq!(link.windows(2 * mib), expect, "{link:?}");
        };
        check(None, Some(1_000_000_000), 1);
        check(Some(0), Some(1_000_000_000), 1);
        check(Some(1), Some(300_000_000), 1);
        // guessed: 3 MB on their way
        check(Some(30), None, 3);
        check(Some(30), Some(125_000_000), 4);
        check(Some(10), Some(1_250_000_000), 12);
        check(Some(u64::MAX / 1_000_000), Some(u64::MAX), u64::MAX);
        assert_eq!(LinkFigures::default().windows(0), 1);
    }

    /// Through so many windows comes so much a round trip: where that is the limit they grow to it.
    #[test]
    fn windows_grow_until_they_are_not_the_limit() {
        let (window, rtt) = (2_u64 << 20, Duration::from_millis(50));
        let mut link = LinkFigures { rtt: Some(rtt), bytes_per_s: Some(1 << 20) };
        let mut seen = Vec::new();
        for _ in 0..40 {
            let windows = link.windows(window);
            seen.push(windows);
            // The path has room for six and a half of them, and a little is lost at both ends.
            let on_its_way = (windows * window).min(window * 13 / 2) * 9 / 10;
            let round_trips = 20;
            link.carried(on_its_way * round_trips, rtt * (round_trips as u32 + 1));
        }
        assert!(seen.is_sorted(), "{seen:?}");
        assert_eq!((seen[0], seen[39]), (1, 12), "{seen:?}");
    }

    #[test]
    fn between_two_others() {
        let ms = |n| Some(Duration::from_millis(n));
        let near = LinkFigures { rtt: ms(1), bytes_per_s: Some(900_000_000) };
        let far = LinkFigures { rtt: ms(80), bytes_per_s: Some(50) };
        let unknown = LinkFigures::default();
        let guess = LinkFigures { rtt: Some(RTT_GUESS), bytes_per_s: Some(BYTES_PER_S_GUESS) };
        for (a, b, expect) in [
            (near, far, far),
            (near, unknown, guess),
            (far, unknown, far),
            (unknown, unknown, unknown),
        ] {
            assert_eq!(LinkFigures::between(a, b), expect);
            assert_eq!(LinkFigures::between(b, a), expect);
        }
    }
}
