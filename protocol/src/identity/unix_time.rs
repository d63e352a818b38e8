//! Wall-clock time, for what must outlive a process: expiry of certificates and tokens.

use std::fmt;

use bincode::{Decode, Encode};

/// Seconds since 1970-01-01T00:00:00Z. Clocks of hosts differ and jump, so nothing but expiry hangs on
/// it; durations inside a process are measured with [`crate::Instant`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct UnixTime(pub u64);

impl UnixTime {
    /// The moment `seconds` later; saturates.
    pub const fn plus(self, seconds: u64) -> UnixTime {
        UnixTime(self.0.saturating_add(seconds))
    }

    /// The moment `seconds` earlier; saturates.
    pub const fn minus(self, seconds: u64) -> UnixTime {
        UnixTime(self.0.saturating_sub(seconds))
    }

    /// Seconds since `earlier`, zero if that lies ahead.
    pub const fn since(self, earlier: UnixTime) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for UnixTime {
    /// As `2026-11-21 09:00:00 UTC`. Days to a date after Howard Hinnant's "chrono-compatible low-level
    /// date algorithms".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, second) = (self.0 / 86_400, self.0 % 86_400);
        if days > DAYS_SHOWN_MAX {
            return write!(f, "{} s after 1970", self.0);
        }
        let shifted = days + 719_468;
        let era = shifted / 146_097;
        let day_of_era = shifted % 146_097;
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        let year = year_of_era + era * 400 + u64::from(month <= 2);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        write!(f, "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
    }
}

/// How far two honest clocks may be apart, in seconds. Formula: what hosts without a running time
/// service drift in a month (about 100 ppm), rounded up. Too small: members refuse each other over
/// clocks. Too large: an expired certificate lives on that much longer.
pub const CLOCK_SKEW_S: u64 = 300;

/// The end of the year 9999.
const DAYS_SHOWN_MAX: u64 = 2_932_896;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_795_251_661, "2026-11-21 09:01:01 UTC"),
            (4_107_542_399, "2100-02-28 23:59:59 UTC"),
            (u64::MAX, "18446744073709551615 s after 1970"),
        ] {
            assert_eq!(UnixTime(seconds).to_string(), text);
        }
    }
}
