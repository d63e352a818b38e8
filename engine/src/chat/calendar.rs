use std::fmt::Write as _;

/// A moment as a template sees it: UTC, proleptic Gregorian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Calendar {
    pub year: i64,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    pub hour: u8,
    pub minute: u8,
    pub second: u8,
    /// 0 is Sunday.
    pub weekday: u8,
}

impl Calendar {
    /// From seconds since 1970-01-01T00:00:00Z (Howard Hinnant, "chrono-compatible low-level
    /// date algorithms").
    pub fn from_unix_s(unix_s: i64) -> Self {
        let (days, second_of_day) = (unix_s.div_euclid(86_400), unix_s.rem_euclid(86_400));
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * march_month + 2) / 5 + 1;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        Self {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month: month as u8,
            day: day as u8,
            hour: (second_of_day / 3_600) as u8,
            minute: (second_of_day / 60 % 60) as u8,
            second: (second_of_day % 60) as u8,
            weekday: (days + 4).rem_euclid(7) as u8,
        }
    }

    /// C's `strftime` in the C locale; an unknown directive stands as it is.
    pub fn strftime(&self, format: &str) -> String {
        let mut out = String::with_capacity(format.len() + 16);
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            match chars.next() {
                Some('-') => match chars.next() {
                    Some(d) => self.directive(&mut out, d, true),
                    None => out.push_str("%-"),
                },
                Some(d) => self.directive(&mut out, d, false),
                None => out.push('%'),
            }
        }
        out
    }

    fn directive(&self, out: &mut String, directive: char, unpadded: bool) {
        let month = MONTHS[usize::from(self.month.clamp(1, 12)) - 1];
        let weekday = WEEKDAYS[usize::from(self.weekday % 7)];
        let mut two = |n: u8| {
            let _ = if unpadded { write!(out, "{n}") } else { write!(out, "{n:02}") };
        };
        match directive {
            'd' => two(self.day),
            'm' => two(self.month),
            'H' => two(self.hour),
            'I' => two((self.hour + 11) % 12 + 1),
            'M' => two(self.minute),
            'S' => two(self.second),
            'y' => two(self.year.rem_euclid(100) as u8),
            'e' => drop(write!(out, "{:2}", self.day)),
            'Y' => drop(write!(out, "{}", self.year)),
            'b' | 'h' => out.push_str(&month[..3]),
            'B' => out.push_str(month),
            'a' => out.push_str(&weekday[..3]),
            'A' => out.push_str(weekday),
            'p' => out.push_str(if self.hour < 12 { "AM" } else { "PM" }),
            'j' => drop(write!(out, "{:03}", self.day_of_year())),
            'w' => drop(write!(out, "{}", self.weekday)),
            'F' => out.push_str(&self.strftime("%Y-%m-%d")),
            'T' => out.push_str(&self.strftime("%H:%M:%S")),
            'R' => out.push_str(&self.strftime("%H:%M")),
            'D' => out.push_str(&self.strftime("%m/%d/%y")),
            'Z' => out.push_str("UTC"),
            'z' => out.push_str("+0000"),
            'n' => out.push('\n'),
            't' => out.push('\t'),
            '%' => out.push('%'),
            other => {
                out.push('%');
                if unpadded {
                    out.push('-');
                }
                out.push(other);
            }
        }
    }

    fn day_of_year(&self) -> u32 {
        let leap = self.year % 4 == 0 && (self.year % 100 != 0 || self.year % 400 == 0);
        let lengths = [31, 28 + u32::from(leap), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
        let before = usize::from(self.month.clamp(1, 12)) - 1;
        lengths[..before].iter().sum::<u32>() + u32::from(self.day)
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments() {
        for (unix_s, expect) in [
            (0, "Thu 01 Jan 1970 00:00:00 001"),
            (951_827_696, "Tue 29 Feb 2000 12:34:56 060"),
            (1_721_952_000, "Fri 26 Jul 2024 00:00:00 208"),
            (-1, "Wed 31 Dec 1969 23:59:59 365"),
            (4_107_542_399, "Sun 28 Feb 2100 23:59:59 059"),
        ] {
            let at = Calendar::from_unix_s(unix_s);
            assert_eq!(at.strftime("%a %d %b %Y %H:%M:%S %j"), expect);
        }
    }

    #[test]
    fn directives() {
        let at = Calendar::from_unix_s(951_827_696);
        for (format, expect) in [
            ("%-d %B %y", "29 February 00"),
            ("%I:%M %p", "12:34 PM"),
            ("%F %T %%", "2000-02-29 12:34:56 %"),
            ("%Q %-", "%Q %-"),
            ("100%", "100%"),
        ] {
            assert_eq!(at.strftime(format), expect, "{format}");
        }
    }
}
