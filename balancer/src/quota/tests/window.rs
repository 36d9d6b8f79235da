//! The most within a time.

use super::*;
use crate::quota::window::Window;

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn tells_the_largest_and_when_it_was_last() {
    let mut window = Window::new(seconds(600));
    assert_eq!(window.peak(seconds(5)), None);
    window.add(seconds(10), 7);
    window.add(seconds(11), 9);
    window.add(seconds(200), 9);
    window.add(seconds(300), 8);
    assert_eq!(window.peak(seconds(300)), Some((9, seconds(100))));
    assert_eq!(
        window.peak(seconds(300)),
        Some((9, seconds(100))),
        "asking changes nothing"
    );
}

#[test]
fn forgets_what_is_older_than_its_length() {
    let mut window = Window::new(seconds(600));
    window.add(seconds(0), 100);
    window.add(seconds(300), 50);
    assert_eq!(window.peak(seconds(600)), Some((100, seconds(600))));
    assert_eq!(
        window.peak(seconds(620)),
        Some((50, seconds(320))),
        "a thirtieth later at the latest"
    );
    assert_eq!(window.peak(seconds(960)), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn is_the_most_of_its_length_and_at_most_a_thirtieth_more(
        length in 60..86_400u64,
        steps in proptest::collection::vec((0..5000u64, 0..1000u64), 1..150),
    ) {
        let mut window = Window::new(seconds(length));
        let mut now = Duration::ZERO;
        let mut seen: Vec<(i128, u64)> = Vec::new();
        for (wait, value) in steps {
            now += Duration::from_millis(wait * length / 60);
            window.add(now, value);
            let millis = |time: Duration| i128::try_from(time.as_millis()).unwrap();
            seen.push((millis(now), value));
            let most_since = |longest: Duration| {
                let since = millis(now) - millis(longest);
                seen.iter().filter(|(at, _)| *at >= since).map(|(_, value)| *value).max()
            };
            let peak = window.peak(now);
            let value = peak.map(|(value, _)| value);
            prop_assert!(value >= most_since(seconds(length)));
            prop_assert!(value <= most_since(seconds(length) + seconds(length) / 30));
            if let Some((value, age)) = peak {
                prop_assert!(seen.contains(&(millis(now) - millis(age), value)));
            }
            prop_assert!(window.parts() <= 32);
        }
    }

    #[test]
    fn never_panics(
        length: Duration,
        steps in proptest::collection::vec((any::<Duration>(), any::<u64>()), 0..50),
    ) {
        let mut window = Window::new(length);
        for (now, value) in steps {
            window.add(now, value);
            let _ = window.peak(now);
            prop_assert!(window.parts() <= 32);
        }
    }
}
