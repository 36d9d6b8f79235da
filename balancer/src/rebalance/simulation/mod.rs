//! Clusters, simulated: nodes that plan at once from counts which are seconds old, clients of
//! several kinds, and what may happen to backends. `docs/moving.md` has the table.

mod cases;
mod random;
mod world;

use self::cases::{Case, Mix, Outcome, Story, settings};
use self::world::{Placing, Settings};
use super::BalanceBy;

/// Clients that call at least each 10 s.
const CALLERS: Mix = Mix {
    streams: 0,
    sticks: 0,
    every: 10_000,
    zipf: false,
};

fn case(name: &'static str, story: Story, backends: usize, clients: usize) -> Case {
    Case {
        name,
        story,
        weights: vec![1; backends],
        clients,
        mix: CALLERS,
        settings: settings(backends.max(4), Placing::Level),
    }
}

fn cases() -> Vec<Case> {
    let stale = |case: Case| Case {
        settings: Settings {
            period: 15_000,
            ..case.settings
        },
        ..case
    };
    let mixed = |case: Case| Case {
        mix: Mix {
            streams: 10,
            sticks: 10,
            ..CALLERS
        },
        ..case
    };
    let one_node = |case: Case| Case {
        settings: settings(1, Placing::Level),
        ..case
    };
    let one_address = |case: Case| Case {
        settings: Settings {
            addresses: 1,
            ..settings(1, Placing::Level)
        },
        ..case
    };
    let weighted = |case: Case| Case {
        weights: vec![1, 1, 2, 4],
        ..case
    };
    vec![
        case("3 → 4", Story::ScaleOut(1), 3, 400),
        case("3 → 4, 60 clients", Story::ScaleOut(1), 3, 60),
        stale(case(
            "3 → 4, counts up to 15 s old",
            Story::ScaleOut(1),
            3,
            400,
        )),
        one_node(case("3 → 4 on one node", Story::ScaleOut(1), 3, 400)),
        one_address(case(
            "3 → 4 on one node, all clients behind one address",
            Story::ScaleOut(1),
            3,
            400,
        )),
        mixed(case(
            "3 → 4, a tenth streams, a tenth comes back",
            Story::ScaleOut(1),
            3,
            400,
        )),
        case("3 → 5", Story::ScaleOut(2), 3, 400),
        stale(case(
            "3 → 5, counts up to 15 s old",
            Story::ScaleOut(2),
            3,
            400,
        )),
        case("19 → 20", Story::ScaleOut(1), 19, 1_000),
        case("5 → 4, drained", Story::Drain(1), 5, 400),
        stale(case(
            "5 → 4, drained, counts up to 15 s old",
            Story::Drain(1),
            5,
            400,
        )),
        case("rolling restart of 3", Story::RollingRestart, 3, 300),
        stale(case(
            "rolling restart of 3, counts up to 15 s old",
            Story::RollingRestart,
            3,
            300,
        )),
        one_address(case(
            "rolling restart of 3 on one node, all clients behind one address",
            Story::RollingRestart,
            3,
            300,
        )),
        case("one of 4 is empty", Story::OneEmpty, 4, 400),
        case("7 of 10 on one of 4", Story::Skewed(7), 4, 400),
        stale(case(
            "7 of 10 on one of 4, counts up to 15 s old",
            Story::Skewed(7),
            4,
            400,
        )),
        case("10, by chance", Story::Chance, 10, 1_000),
        case("20, by chance", Story::Chance, 20, 300),
        weighted(case(
            "weights 1, 1, 2, 4, half on the first",
            Story::Skewed(5),
            4,
            400,
        )),
        weighted(case("weights 1, 1, 2, 4, by chance", Story::Chance, 4, 400)),
    ]
}

/// The same, of clients that come back to anybody.
fn by_chance(case: Case) -> Case {
    Case {
        settings: Settings {
            placing: Placing::Chance,
            ..case.settings
        },
        ..case
    }
}

fn by_bytes() -> Vec<Case> {
    let by_bytes = |case: Case| Case {
        mix: Mix {
            zipf: true,
            ..case.mix
        },
        settings: Settings {
            placing: Placing::LeastLoad,
            balance_by: BalanceBy::Bytes,
            ..case.settings
        },
        ..case
    };
    vec![
        by_bytes(case(
            "3, 60 clients, numbers even",
            Story::ScaleOut(0),
            3,
            60,
        )),
        by_bytes(case("3 → 4, 60 clients", Story::ScaleOut(1), 3, 60)),
        by_bytes(case(
            "3, 400 clients, numbers even",
            Story::ScaleOut(0),
            3,
            400,
        )),
        by_bytes(case("3 → 4, 400 clients", Story::ScaleOut(1), 3, 400)),
        by_bytes(case(
            "10, 1,000 clients, by chance",
            Story::Chance,
            10,
            1_000,
        )),
        by_bytes(case("5 → 4, drained, 400 clients", Story::Drain(1), 5, 400)),
    ]
}

/// Of some runs the mean, and the worst.
fn play(case: &Case, runs: u64) -> Vec<Outcome> {
    (0..runs).map(|run| case.play(run + 1)).collect()
}

fn print(title: &str, cases: &[Case], runs: u64) {
    println!("\n**{title}**\n");
    println!(
        "| | before | after 2 min | in the end | numbers | even after, s | moved / least | by | twice | fastest | late | lost |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for case in cases {
        let all = play(case, runs);
        let mean = |of: fn(&Outcome) -> f64| all.iter().map(of).sum::<f64>() / runs as f64;
        let worst = |of: fn(&Outcome) -> f64| all.iter().map(of).fold(0.0, f64::max);
        println!(
            "| {} | {:.2} | {:.3} ({:.3}, {:.0}) | {:.3} ({:.3}, {:.0}) | {:.2} | {:.0} ({:.0}) | {:.0} / {:.0} | {:.2} ({:.2}) | {:.0} | {:.0} | {:.1} | {:.0} |",
            case.name,
            mean(|one| one.before),
            mean(|one| one.after),
            worst(|one| one.after),
            worst(|one| one.apart),
            mean(|one| one.end),
            worst(|one| one.end),
            worst(|one| one.apart_end),
            worst(|one| one.numbers),
            mean(|one| one.even_after),
            worst(|one| one.even_after),
            mean(|one| one.moves),
            mean(|one| one.least),
            mean(|one| one.moves / one.least),
            worst(|one| one.moves / one.least),
            worst(|one| one.twice),
            worst(|one| one.fastest),
            mean(|one| one.late),
            worst(|one| one.lost),
        );
    }
}

/// `cargo test --release -p balancer --lib rebalance::simulation::the_whole_table -- --ignored
/// --nocapture` prints the tables.
#[test]
#[ignore = "takes minutes, and is for the tables in docs/moving.md"]
fn the_whole_table() {
    print("placed", &cases(), 4);
    let chance: Vec<Case> = cases().into_iter().map(by_chance).collect();
    print("by chance", &chance, 4);
    print("bytes", &by_bytes(), 4);
}

/// Plays some cases, and compares with what is tolerated.
fn check(cases: &[Case], is_fine: impl Fn(&Outcome) -> bool) {
    let mut complaints = Vec::new();
    for case in cases {
        for outcome in play(case, 2) {
            if !is_fine(&outcome) {
                complaints.push(format!("{}: {outcome:?}", case.name));
            }
        }
    }
    assert!(complaints.is_empty(), "{complaints:#?}");
}

/// Nobody was told twice, and nothing goes on and on.
fn is_calm(outcome: &Outcome) -> bool {
    outcome.twice < 1.0 && outcome.late < 1.0 && outcome.lost < 1.0
}

/// Of few connections a handful is much.
fn are_few(outcome: &Outcome) -> bool {
    outcome.moves <= (1.3 * outcome.least).max(outcome.least + 6.0)
}

fn is_even(by_mean: f64, apart: f64) -> bool {
    by_mean <= 1.051 || apart <= 2.01
}

#[test]
fn placed_clients_are_even_in_two_minutes_with_few_moves() {
    let names = [
        "3 → 4",
        "3 → 4, 60 clients",
        "3 → 4 on one node",
        "3 → 4 on one node, all clients behind one address",
        "3 → 5",
        "5 → 4, drained",
    ];
    let of_names = cases()
        .into_iter()
        .filter(|case| names.contains(&case.name));
    check(&of_names.collect::<Vec<_>>(), |one| {
        is_calm(one) && is_even(one.after, one.apart) && are_few(one)
    });
}

#[test]
fn old_counts_do_not_overshoot() {
    let old = cases()
        .into_iter()
        .filter(|case| case.settings.period > 2_000);
    let old = old.filter(|case| !case.name.contains("rolling"));
    check(&old.collect::<Vec<_>>(), |one| {
        is_calm(one) && is_even(one.after, one.apart) && are_few(one)
    });
}

#[test]
fn weights_and_skew_are_evened_out() {
    let names = [
        "weights 1, 1, 2, 4, half on the first",
        "7 of 10 on one of 4",
        "20, by chance",
    ];
    let of_names = cases()
        .into_iter()
        .filter(|case| names.contains(&case.name));
    check(&of_names.collect::<Vec<_>>(), |one| {
        is_calm(one) && is_even(one.after, one.apart) && one.moves <= 1.4 * one.least
    });
}

#[test]
fn a_rolling_restart_loses_nothing_and_ends_even() {
    let rolling = cases()
        .into_iter()
        .filter(|case| case.name.contains("rolling"));
    check(&rolling.collect::<Vec<_>>(), |one| {
        is_calm(one) && is_even(one.after, one.apart)
    });
}

#[test]
fn clients_that_come_back_anywhere_are_told_once() {
    let names = ["3 → 5", "weights 1, 1, 2, 4, by chance"];
    let of_names = cases()
        .into_iter()
        .filter(|case| names.contains(&case.name));
    let chance: Vec<Case> = of_names.map(by_chance).collect();
    check(&chance, |one| {
        one.twice < 1.0 && one.moves <= 3.0 * one.least && one.end < 1.3
    });
}
