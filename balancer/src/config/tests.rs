use std::{fmt::Write as _, fs, io::Write as _, os::unix::fs::PermissionsExt as _};

use proptest::prelude::*;

use super::*;

mod document;
mod kubernetes;
mod selector;

fn parsed(text: &str) -> Config {
    Config::parse(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn refused(text: &str) -> String {
    match Config::parse(text) {
        Err(error) => error.to_string(),
        Ok(config) => panic!("should be refused:\n{text}\n{config:?}"),
    }
}

/// Checks that `text` is refused because of this line, in these words and with advice.
fn is_refused(text: &str, line: usize, words: &str) {
    let message = refused(text);
    assert!(
        message.starts_with(&format!("line {line}, column ")),
        "not on line {line}: {message}\n{text}"
    );
    assert!(
        message.contains(words),
        "{message}\ndoes not say: {words}\n{text}"
    );
    assert!(message.contains("; "), "no advice: {message}");
}

/// A service that is right, then `more` from line 4.
fn with(more: &str) -> String {
    format!("services:\n  - name: agents\n    port: 11800\n{more}")
}

/// YAML takes brackets without quotes for a list.
#[test]
fn an_address_in_brackets_without_quotes_is_told_to_need_them() {
    for backends in [
        "[[::1]:8001]",
        "[::1]:8001",
        "[fe80::1]:8001",
        "[\"[::1]:8001\", [::1]:8002]",
        "\n      - [::1]:8001",
        "\n      - {address: [::1]:8001}",
        "\n      - address: [::1]:8001",
    ] {
        let text = with(&format!("    backends: {backends}\n"));
        let line = text.lines().count();
        let words = "an IPv6 address with a port needs quotes; write \"[::1]:21801\"";
        is_refused(&text, line, words);
    }
}

#[test]
fn the_smallest_file() {
    let config = parsed(&with(""));
    assert_eq!(
        config,
        Config {
            services: vec![Service {
                name: "agents".to_owned(),
                port: 11800,
                address: None,
                policy: Policy::LeastConnections,
                backends: None,
                quota: QuotaRule::Unlimited,
                exempt: Vec::new(),
                health: true,
                keepalive: Some(Keepalive::DEFAULT),
                moving: MoveRule::Graceful,
                rebalance: false,
            }],
            connects: Vec::new(),
            effect: Effect::On,
            fail_open_after: Duration::from_secs(30),
            namespaces: NetnsScope::Own,
            kubernetes: None,
        }
    );
}

#[test]
fn an_entry_of_connects_alone_or_beside_a_port() {
    let config = parsed(
        r#"
services:
  - name: agents
    connect:
      to: ["10.0.0.9:11800", "[fd00::9]:11800"]
      endpoints: [{address: "10.0.0.9:11800", weight: 2}, "[::ffff:10.0.0.12]:11801", "[fd00::9]:11800"]
  - name: als
    port: 11802
    connect: {to: ["127.0.0.1:11802"], endpoints: [{address: "10.0.0.9:11800", weight: 2}, "127.0.0.1:11803"]}
"#,
    );
    let names = |names: Vec<&String>| names.into_iter().cloned().collect::<Vec<_>>();
    let services = names(config.services.iter().map(|one| &one.name).collect());
    let connects = names(config.connects.iter().map(|one| &one.name).collect());
    assert_eq!(
        (services, connects),
        (
            vec!["als".to_owned()],
            vec!["agents".to_owned(), "als".to_owned()]
        )
    );
    let agents = &config.connects[0];
    let endpoint = |address: &str, weight| ConnectEndpoint {
        address: address.parse().unwrap(),
        weight,
    };
    assert_eq!(
        agents.endpoints,
        [
            endpoint("10.0.0.9:11800", 2),
            endpoint("10.0.0.12:11801", 1),
            endpoint("[fd00::9]:11800", 1)
        ]
    );
    assert_eq!(agents.to.len(), 2);
}

#[test]
fn more_addresses_than_the_kernel_half_has_room_for_are_refused() {
    let many = |count: usize, port: usize| {
        let one = |n: usize| format!("\"10.1.{}.{}:{port}\"", n / 250, n % 250 + 1);
        (0..count).map(one).collect::<Vec<_>>().join(", ")
    };
    let entry = |name: usize, to: &str, endpoints: &str| {
        format!("  - {{name: n{name}, connect: {{to: [{to}], endpoints: [{endpoints}]}}}}\n")
    };
    let file = |entries: &[String]| format!("services:\n{}", entries.concat());
    let own = |name: usize| format!("\"10.0.0.{}:1\"", name + 1);
    is_refused(
        &file(&[entry(0, &many(257, 1), &own(0))]),
        2,
        "it can have at most 256",
    );
    is_refused(
        &file(&[entry(0, &own(0), &many(257, 1))]),
        2,
        "it can have at most 256",
    );
    let frontends: Vec<_> = (0..5)
        .map(|n| entry(n, &many(205, n + 1), &own(n)))
        .collect();
    is_refused(&file(&frontends), 6, "more than 1024 addresses");
    let endpoints: Vec<_> = (0..5)
        .map(|n| entry(n, &own(n), &many(205, n + 1)))
        .collect();
    is_refused(&file(&endpoints), 6, "more than 1024 endpoints");
    parsed(&file(&endpoints[1..]));
}

#[test]
fn the_largest_file() {
    let config = parsed(
        r#"
# every key there is
services:
  - name: agents
    port: 11800
    address: 10.0.0.9
    policy: source-hash
    backends: ["127.0.0.1:21801", {address: "[::1]:21802", weight: 2}, "::ffff:127.0.0.1:21803"]
    quota: {clients: 300, connections_per_client: 2, headroom: 15%, min_quota: 20}
    exempt: [10.0.0.0/24, 10.1.2.3, "fd00::/8", "::1", "::ffff:192.0.2.0/120", 10.0.0.0/24]
    health: off
  - name: als
    port: 11802
    policy: round-robin
    quota:
      per_backend: 100
    keepalive: {idle: 2m, probes: 127}
fail_open_after: 1500 ms
namespaces: [/run/netns/blue, /proc/1/ns/net]
"#
        .replace("\"::ffff:127.0.0.1:21803\"", "\"[::ffff:127.0.0.1]:21803\"")
        .as_str(),
    );
    let agents = &config.services[0];
    assert_eq!(agents.address, Some("10.0.0.9".parse().unwrap()));
    assert_eq!(agents.policy, Policy::SourceHash);
    let backends: Vec<_> = agents
        .backends
        .iter()
        .flatten()
        .map(|backend| (backend.address.to_string(), backend.weight))
        .collect();
    assert_eq!(
        backends,
        [
            ("127.0.0.1:21801".to_owned(), 1),
            ("[::1]:21802".to_owned(), 2),
            ("127.0.0.1:21803".to_owned(), 1)
        ]
    );
    assert_eq!(
        agents.quota,
        QuotaRule::Computed {
            clients: Some(300),
            connections_per_client: 2,
            headroom_percent: 15,
            min_quota: 20
        }
    );
    assert!(!agents.health && config.services[1].health);
    let exempt: Vec<String> = agents.exempt.iter().map(ToString::to_string).collect();
    assert_eq!(
        exempt,
        [
            "10.0.0.0/24",
            "10.1.2.3/32",
            "fd00::/8",
            "::1/128",
            "192.0.2.0/24"
        ]
    );
    assert_eq!(config.services[1].quota, QuotaRule::Fixed(100));
    let keepalive = Keepalive {
        idle: 120,
        probes: 127,
        ..Keepalive::DEFAULT
    };
    assert_eq!(config.services[1].keepalive, Some(keepalive));
    assert_eq!(config.fail_open_after, Duration::from_millis(1500));
    assert_eq!(
        config.namespaces,
        NetnsScope::Paths(vec!["/run/netns/blue".into(), "/proc/1/ns/net".into()])
    );
}

#[test]
fn what_is_left_out_of_a_computed_quota_has_a_default() {
    let config = parsed(&with("    quota: {clients: 7}\n"));
    let expected = QuotaRule::Computed {
        clients: Some(7),
        connections_per_client: 1,
        headroom_percent: 0,
        min_quota: 1,
    };
    assert_eq!(config.services[0].quota, expected);
}

#[test]
fn keepalive_is_on_and_can_be_turned_off() {
    let keepalive = |more: &str| parsed(&with(more)).services[0].keepalive;
    for on in ["", "    keepalive: on\n", "    keepalive: true\n"] {
        assert_eq!(keepalive(on), Some(Keepalive::DEFAULT));
    }
    for off in ["off", "\"off\"", "false"] {
        assert_eq!(keepalive(&format!("    keepalive: {off}\n")), None);
    }
    let written_out = "    keepalive: {idle: 60s, interval: 10s, probes: 3}\n";
    assert_eq!(keepalive(written_out), Some(Keepalive::DEFAULT));
    let least = Keepalive {
        idle: 1,
        interval: 1,
        probes: 1,
    };
    let least_text = "    keepalive: {idle: 1000ms, interval: 1s, probes: 1}\n";
    assert_eq!(keepalive(least_text), Some(least));
}

#[test]
fn rules_in_words() {
    let words = |quota: &str| parsed(&with(quota)).services[0].quota.to_string();
    assert_eq!(words(""), "none: steering only");
    assert_eq!(
        words("    quota: {per_backend: 100}\n"),
        "100 for each backend"
    );
    assert_eq!(
        words("    quota: {clients: 300, connections_per_client: 2, headroom: 15%}\n"),
        "300 clients × 2 + 15% shared by weight"
    );
    assert_eq!(
        words("    quota: {headroom: 15%}\n"),
        "clients (not known) × 1 + 15% shared by weight"
    );
    let longest = QuotaRule::Computed {
        clients: Some(u32::MAX),
        connections_per_client: u32::MAX,
        headroom_percent: u32::MAX,
        min_quota: u32::MAX,
    };
    assert!(longest.to_string().len() < 128);
}

#[test]
fn times_have_units_and_bounds() {
    for (text, seconds) in [
        ("1s", 1),
        ("30s", 30),
        ("2m", 120),
        ("1h", 3600),
        ("1000ms", 1),
        ("60m", 3600),
    ] {
        let config = parsed(&with(&format!("fail_open_after: {text}\n")));
        assert_eq!(
            config.fail_open_after,
            Duration::from_secs(seconds),
            "{text}"
        );
    }
}

#[test]
fn an_exact_address_may_share_a_port_with_any() {
    let config = parsed(&with(
        "  - {name: vip, port: 11800, address: 10.0.0.9}\n  - {name: other, port: 11800, address: \"::1\"}\n",
    ));
    assert_eq!(config.services.len(), 3);
}

#[test]
fn a_backend_may_use_the_port_at_another_address() {
    parsed(
        "services:\n  - {name: a, port: 11800, address: 10.0.0.9, backends: [\"10.0.0.1:11800\"]}\n",
    );
}

#[test]
fn an_alias_is_the_value_that_it_names() {
    let config = parsed(
        "services:\n  - {name: a, port: 1, exempt: &peers [10.0.0.0/24]}\n  - {name: b, port: 2, exempt: *peers}\n",
    );
    assert_eq!(config.services[0].exempt, config.services[1].exempt);
}

#[test]
fn a_byte_order_mark_and_windows_line_ends_are_fine() {
    assert_eq!(parsed(&format!("\u{feff}{}", with(""))), parsed(&with("")));
    assert_eq!(parsed(&with("").replace('\n', "\r\n")), parsed(&with("")));
}

/// Runs a table of wrong files, in which `...` stands for a service that is `right`.
fn are_refused(table: &str, right: &str) {
    let mut count = 0;
    for case in table.split("\n\n") {
        let Some((text, expected)) = case.split_once("\n-> ") else {
            continue;
        };
        let text = match text.strip_prefix("...\n") {
            Some(more) => format!("{right}{more}\n"),
            None => format!("{text}\n"),
        };
        let (line, words) = expected
            .trim_end()
            .split_once(": ")
            .expect("-> LINE: WORDS");
        for words in words.split("\n-> ") {
            is_refused(&text, line.parse().expect("a line"), words);
        }
        count += 1;
    }
    assert!(count > 80, "{count} cases");
}

#[test]
fn every_mistake_has_its_line_and_its_words() {
    are_refused(include_str!("tests/errors.txt"), &with(""));
    let in_cluster = "kubernetes:\n  services:\n  - name: agents\n";
    are_refused(include_str!("tests/kubernetes_errors.txt"), in_cluster);
    is_refused(&with("\texempt: []\n"), 3, "this is not valid YAML");
}

#[test]
fn a_file_without_settings() {
    for text in ["", "\n", "# nothing\n", "---\n...\n"] {
        let message = refused(text);
        assert!(message.contains("settings"), "{message}");
    }
}

#[test]
fn too_many_of_anything() {
    let mut services = "services:\n".to_owned();
    for index in 0..=MAX_SERVICES {
        writeln!(services, "  - {{name: s{index}, port: {}}}", index + 1).unwrap();
    }
    assert_eq!(
        refused(&services),
        "line 66, column 5: 65 services, at most 64 are possible; remove some, or run several daemons with a --state-dir each"
    );

    let mut backends = with("    backends:\n");
    for index in 0..=MAX_SERVICE_BACKENDS {
        writeln!(backends, "      - 127.0.0.1:{}", 20_000 + index).unwrap();
    }
    assert_eq!(
        refused(&backends),
        "line 261, column 9: 257 backends, a service can have at most 256; remove some, or split the service"
    );

    let mut all = "services:\n".to_owned();
    for service in 0..5 {
        write!(
            all,
            "  - name: s{service}\n    port: {}\n    backends:\n",
            service + 1
        )
        .unwrap();
        for index in 0..205 {
            writeln!(all, "      - 127.0.0.1:{}", 20_000 + 205 * service + index).unwrap();
        }
    }
    assert!(
        refused(&all).starts_with("line 1041, column 9: more than 1024 backends in all; "),
        "{}",
        refused(&all)
    );

    let networks = vec!["10.0.0.1"; MAX_EXEMPT + 1].join(",");
    let message = refused(&with(&format!("    exempt: [{networks}]\n")));
    assert!(
        message.starts_with("line 4, column 2318: 257 exempt networks"),
        "{message}"
    );
}

#[test]
fn a_bomb_of_aliases_is_one_short_error() {
    let mut text = "services: []\na0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..64 {
        let inner = vec![format!("*a{}", level - 1); 9].join(", ");
        writeln!(text, "a{level}: &a{level} [{inner}]").unwrap();
    }
    assert!(
        refused(&text).starts_with("line 2, column 1: unknown key `a0`"),
        "{}",
        refused(&text)
    );

    let text = "services: &s\n  - {name: a, port: 1, exempt: &e [10.0.0.1, *e]}\n";
    assert!(
        refused(text).contains("inside the value"),
        "{}",
        refused(text)
    );
}

#[test]
fn a_switch_is_on_or_off() {
    let health = |value: &str| parsed(&with(&format!("    health: {value}\n"))).services[0].health;
    assert!(health("on") && health("true"));
    assert!(!health("off") && !health("false"));
    is_refused(
        &with("    health: no\n"),
        4,
        "health `no` is not understood; write on or off",
    );
}

#[test]
fn a_message_shows_only_the_start_of_what_it_quotes_and_no_control_characters() {
    let message = refused(&with(&format!(
        "    policy: \"\\e[31m{}\"\n",
        "x".repeat(10_000)
    )));
    assert!(message.len() < 300, "{message}");
    assert!(!message.contains('\u{1b}'));
}

/// The parser places what is absent at the end of the text on the line behind it.
#[test]
fn no_error_is_on_a_line_behind_the_last() {
    for (text, line) in [
        ("?\n", 1),
        ("? # a comment\n\n", 2),
        ("services:\r\n- ?\r\n", 2),
        ("services:\r- ?\r", 2),
        ("services: [\n", 1),
        ("services:\n- \"a\n", 2),
        ("? ", 1),
    ] {
        let error = Config::parse(text).expect_err("should be refused");
        assert!(
            error.line().is_some_and(|found| found <= line),
            "{text:?}: {error}"
        );
    }
}

#[test]
fn a_tag_is_shown_as_any_other_word() {
    let message = refused(&format!("services: !{} 1\n", "a".repeat(5000)));
    assert!(message.len() < 200, "{message}");
    assert!(message.contains("the YAML tag !aaa"), "{message}");
}

mod files {
    use super::*;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn load(path: &Path) -> String {
        Config::load(path)
            .expect_err("should be refused")
            .to_string()
    }

    #[test]
    fn a_good_one_and_its_errors_by_line() {
        assert_eq!(
            Config::load(file(with("").as_bytes()).path()),
            Ok(parsed(&with("")))
        );
        let bad = file(with("    prot: 1\n").as_bytes());
        let message = load(bad.path());
        let start = format!("{}:4:5: unknown key `prot`", bad.path().display());
        assert!(message.starts_with(&start), "{message}");
    }

    #[test]
    fn none_there_or_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        assert_eq!(
            load(path),
            format!(
                "{}: this is a directory, not a file; give the path of a file in it with --config",
                path.display()
            )
        );
        let missing = path.join("none.yaml");
        assert_eq!(
            load(&missing),
            format!(
                "{}: no such file; give the path of a configuration file with --config",
                missing.display()
            )
        );
        let below = file(b"").path().join("x");
        assert!(load(&below).contains("can't be read") || load(&below).contains("no such file"));
    }

    #[test]
    fn not_readable() {
        let file = file(b"");
        file.as_file()
            .set_permissions(fs::Permissions::from_mode(0o000))
            .unwrap();
        // Root may read it all the same, and then finds it empty.
        let message = load(file.path());
        let expected = if nix::unistd::geteuid().is_root() {
            "no settings"
        } else {
            "not allowed to read it"
        };
        assert!(message.contains(expected), "{message}");
    }

    #[test]
    fn too_large_or_without_an_end() {
        let large = file(&vec![b' '; 10 << 20]);
        assert!(load(large.path()).ends_with(": larger than 1048576 bytes (1 MiB), the most a configuration may have; check that this is the right file"));
        assert!(load(Path::new("/dev/zero")).contains("larger than 1048576 bytes"));
        let fits = file(&vec![b' '; 1 << 20]);
        assert!(load(fits.path()).contains("no settings"));
    }

    #[test]
    fn not_text() {
        let bad = file(b"services:\n  - name: \xff\n");
        assert_eq!(
            load(bad.path()),
            format!(
                "{}:2:11: this is not UTF-8 text; save the file as UTF-8",
                bad.path().display()
            )
        );
        assert!(load(file(b"\x7fELF\x02\x01\x01\0\0\0").path()).contains(":1:"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,80}") {
        let _ = Config::parse(&text);
    }

    #[test]
    fn no_yaml_makes_it_panic(text in "[-a-z0-9:,\\[\\]{}\"'&*!|>%#?~<.\n\t ]{0,120}") {
        let _ = Config::parse(&text);
    }

    #[test]
    fn no_damage_to_a_good_file_makes_it_panic(at in 0..400usize, with in "[-a-z0-9:,\\[\\]{}\"'&*!|>\n ]{0,3}", cut in 0..5usize) {
        let good = "services:\n  - name: agents\n    port: 11800\n    address: 10.0.0.9\n    policy: source-hash\n    \
            backends: [\"127.0.0.1:21801\", {address: \"[::1]:21802\", weight: 2}]\n    \
            quota: {clients: 300, connections_per_client: 2, headroom: 15%}\n    exempt: [10.0.0.0/24, \"::1\"]\n\
            fail_open_after: 30s\nnamespaces: own\n";
        parsed(good);
        let at = at.min(good.len());
        let end = (at + cut).min(good.len());
        let damaged = format!("{}{with}{}", &good[..at], &good[end..]);
        if let Err(error) = Config::parse(&damaged) {
            let message = error.to_string();
            prop_assert!(message.contains("; "), "{}", message);
            prop_assert!(error.line().is_some() || message.contains("no settings"), "{}", message);
        }
    }

    #[test]
    fn numbers_are_what_they_look_like(port: u16, weight in 0..2000u32, quota: u32, headroom in 0..2000u32) {
        let text = format!(
            "services:\n- {{name: a, port: {port}, backends: [{{address: \"10.0.0.1:1\", weight: {weight}}}], quota: {{clients: {quota}, headroom: {headroom}%}}}}\n"
        );
        let possible = port > 1 && (1..=MAX_WEIGHT).contains(&weight) && (1..=MAX_CONNECTIONS).contains(&quota) && headroom <= MAX_HEADROOM_PERCENT;
        match Config::parse(&text) {
            Ok(config) => {
                prop_assert!(possible);
                let service = &config.services[0];
                prop_assert_eq!(service.port, port);
                prop_assert_eq!(service.backends.as_ref().unwrap()[0].weight, weight);
                let is_so = matches!(service.quota, QuotaRule::Computed { clients: Some(c), headroom_percent: h, .. } if c == quota && h == headroom);
                prop_assert!(is_so);
            }
            Err(error) => prop_assert!(!possible, "{}", error),
        }
    }
}
