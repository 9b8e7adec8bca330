"""The functions that a condition may use, and bounds of what they cost.

A function is allowed if its value depends on its arguments alone: not on other rows, the clock, chance, files, the
environment or the session. Its result must be bounded by the size of its arguments, or its size must be a constant.
"""

from __future__ import annotations

# The result has a fixed size: a number, a truth value, a time, or a short name.
FIXED = frozenset(
    """
    + - * / // % & | ~ << >> ** ^ ^@ @ && @> <@ ~~ !~~ ~~* !~~* ~~~
    like_escape not_like_escape ilike_escape not_ilike_escape
    words characters least greatest aspect

    abs acos acosh add asin asinh atan atan2 atanh bit_count cbrt ceil ceiling cos cosh cot degrees divide even exp
    factorial fdiv floor fmod gamma gcd greatest_common_divisor isfinite isinf isnan lcm least_common_multiple lgamma
    ln log log10 log2 mod multiply nextafter pi pow power radians round round_even roundbankers sign signbit sin sinh
    sqrt subtract tan tanh trunc xor

    ascii bit_length char_length character_length chr contains damerau_levenshtein editdist3 ends_with hamming hash
    instr jaccard jaro_similarity jaro_winkler_similarity length length_grapheme len levenshtein md5_number
    md5_number_lower md5_number_upper mismatches octet_length ord position prefix regexp_full_match regexp_matches
    starts_with strlen strpos suffix typeof unicode

    age century date_add date_diff date_part date_sub date_trunc datediff datepart datesub datetrunc day dayname
    dayofmonth dayofweek dayofyear days_in_month decade epoch epoch_ms epoch_ns epoch_us era hour isodow isoyear julian
    last_day make_date make_time make_timestamp make_timestamp_ms make_timestamp_ns microsecond millennium millisecond
    minute month monthname nanosecond quarter second strptime time_bucket timezone to_centuries to_days to_decades
    to_hours to_microseconds to_millennia to_milliseconds to_minutes to_months to_quarters to_seconds to_timestamp
    to_weeks to_years try_strptime week weekday weekofyear year yearweek

    array_contains array_cosine_distance array_cosine_similarity array_distance array_dot_product array_has
    array_has_all array_has_any array_indexof array_inner_product array_length array_negative_dot_product
    array_negative_inner_product array_position array_unique cardinality list_avg list_bool_and list_bool_or
    list_contains list_cosine_distance list_cosine_similarity list_count list_distance list_dot_product list_has
    list_has_all list_has_any list_indexof list_inner_product list_median list_negative_dot_product
    list_negative_inner_product list_position list_product list_stddev_pop list_stddev_samp list_sum list_unique
    list_var_pop list_var_samp map_contains map_contains_entry map_contains_value
    json_array_length json_contains json_exists json_type json_valid
    """.split()
)
# The result is a part of the arguments, or all of them together.
PARTS = frozenset(
    """
    || ->> array_append array_cat array_concat array_distinct array_extract array_intersect array_pop_back
    array_pop_front array_prepend array_push_back array_push_front array_reverse array_reverse_sort array_slice
    array_sort array_value array_zip concat concat_ws element_at flatten if json_extract json_extract_path
    json_extract_path_text json_extract_string json_value left left_grapheme list_any_value list_append list_cat
    list_concat list_distinct list_element list_extract list_first list_intersect list_last list_max list_min list_mode
    list_pack list_prepend list_reverse list_reverse_sort list_slice list_sort list_value list_zip ltrim map map_concat
    map_entries map_extract map_extract_value map_from_entries map_keys map_values nullif parse_dirname
    parse_dirpath parse_filename regexp_extract reverse right right_grapheme row rtrim split_part
    struct_concat struct_extract struct_extract_at struct_keys struct_pack substr substring substring_grapheme trim
    """.split()
)
# The result is a text that is up to GROWTH times as long as the arguments.
TEXT = frozenset(
    """
    base64 bin decode encode format_bytes formatreadabledecimalsize formatreadablesize from_base64 from_binary from_hex
    hex json_quote lcase lower md5 nfc_normalize regexp_escape sha1 sha256 strftime strip_accents to_base64 to_binary
    to_hex to_json translate ucase unbin unhex upper url_decode url_encode
    """.split()
)
# The result is a list of pieces of a text, which take up to LIST_GROWTH times as much memory.
LIST = frozenset(
    """
    json_keys parse_path regexp_extract_all regexp_split_to_array split str_split str_split_regex string_split
    string_split_regex string_to_array
    """.split()
)
# The size of the result is itself an argument, which must be a constant.
SIZED = frozenset("array_to_string format lpad printf regexp_replace repeat replace rpad".split())

ALLOWED = FIXED | PARTS | TEXT | LIST | SIZED

GROWTH = 8
LIST_GROWTH = 20

# Functions that shorten a text to as many characters as an argument says: the index of this argument.
CUT = {"left": 1, "right": 1, "substr": 2, "substring": 2}
# Functions that take time in proportion to the product of two lengths, and bytes per such step.
PAIRWISE = {
    "levenshtein": 0,
    "editdist3": 0,
    "damerau_levenshtein": 8,
    "jaro_similarity": 0,
    "jaro_winkler_similarity": 0,
}
# Functions that match a regular expression, their second argument.
REGULAR = frozenset(name for name in ALLOWED if name.startswith("regexp_") or name.endswith("split_regex"))
# Functions that match a pattern, their second argument, with these wildcards. In versions of DuckDB before 2, time is a
# power of the length of the text, with the number of wildcards as the exponent.
PATTERNS = {
    "~~": "%", "!~~": "%", "~~*": "%", "!~~*": "%", "~~~": "*",
    "like_escape": "%", "not_like_escape": "%", "ilike_escape": "%", "not_ilike_escape": "%",
}  # fmt: skip
# Functions that DuckDB replaces by an expression that has their arguments this many times, at most.
COPIES = {"aspect": 6, "least": 3, "greatest": 3, "number_or_null": 2, "nullif": 2, "fmod": 3, "fdiv": 2}

# Functions that are NaN wherever an argument is.
NAN_IN_NAN_OUT = frozenset(
    """
    + - * / % abs acos add asin atan cbrt ceil ceiling cos cosh cot degrees divide exp floor ln log log10 log2 multiply
    radians round sin sinh sqrt subtract tan tanh
    """.split()
)
ABOUT_NAN = frozenset({"isnan", "isinf", "isfinite"})

# The types that a value may be cast to; all but those of TEXT_TYPES have a fixed size.
TEXT_TYPES = frozenset(
    "BIT BITSTRING BLOB BPCHAR BYTEA BINARY VARBINARY CHAR JSON NVARCHAR STRING TEXT VARCHAR".split()
)
TYPES = (
    TEXT_TYPES
    | {"TIMESTAMP WITH TIME ZONE", "TIME WITH TIME ZONE"}
    | frozenset(
        """
    BOOL BOOLEAN LOGICAL TINYINT INT1 SMALLINT INT2 SHORT INT16 INTEGER INT INT4 SIGNED INT32 BIGINT INT8 LONG INT64
    OID HUGEINT INT128 UTINYINT UINT8 USMALLINT UINT16 UINTEGER UINT32 UBIGINT UINT64 UHUGEINT UINT128 FLOAT REAL
    FLOAT4 DOUBLE FLOAT8 DECIMAL DEC NUMERIC DATE TIME TIMESTAMP DATETIME TIMESTAMP_S TIMESTAMP_MS TIMESTAMP_US
    TIMESTAMP_NS TIMESTAMPTZ TIMETZ INTERVAL UUID GUID
    """.split()
    )
)
