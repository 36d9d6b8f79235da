//! The API server's clock, as the headers of its answers tell it.
//!
//! Ages of what it has stored are measured by it alone: the clocks of nodes are compared with no
//! other.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::HeaderMap;
use http::header::DATE;
use k8s_openapi::jiff::Timestamp;
use k8s_openapi::jiff::fmt::rfc2822::DateTimeParser;
use tokio::time::Instant;

/// What the clock showed last, and when that was here.
#[derive(Debug, Default)]
pub(crate) struct ServerClock(Mutex<Option<(Timestamp, Instant)>>);

impl ServerClock {
    /// Takes the time out of an answer that has one.
    pub(crate) fn note(&self, headers: &HeaderMap) {
        let text = headers.get(DATE).and_then(|date| date.to_str().ok());
        // The form of HTTP dates (RFC 9110, 5.6.7) is one of those of mail.
        let time = text.and_then(|text| DateTimeParser::new().parse_timestamp(text).ok());
        if let Some(time) = time {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((time, Instant::now()));
        }
    }

    /// How long ago this was, to the second; zero where it is to come. `None`: no answer has told
    /// the time.
    pub(crate) fn since(&self, then: Timestamp) -> Option<Duration> {
        let (told, at) = (*self.0.lock().unwrap_or_else(PoisonError::into_inner))?;
        let before = Duration::try_from(told.duration_since(then)).unwrap_or_default();
        Some(before.saturating_add(at.elapsed()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[tokio::test(start_paused = true)]
    async fn an_age_is_what_the_server_told_and_the_time_since() {
        let clock = ServerClock::default();
        let then: Timestamp = "2026-11-29T05:00:00Z".parse().unwrap();
        assert_eq!(clock.since(then), None);
        let mut headers = HeaderMap::new();
        for date in ["", "yesterday", "Sun, 99 Nov 2026 05:00:40 GMT"] {
            headers.insert(DATE, HeaderValue::from_static(date));
            clock.note(&headers);
            assert_eq!(clock.since(then), None, "{date}");
        }
        headers.insert(
            DATE,
            HeaderValue::from_static("Sun, 29 Nov 2026 05:00:40 GMT"),
        );
        clock.note(&headers);
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(clock.since(then), Some(Duration::from_secs(45)));
        let to_come: Timestamp = "2026-11-29T06:00:00Z".parse().unwrap();
        assert_eq!(clock.since(to_come), Some(Duration::from_secs(5)));
    }
}
