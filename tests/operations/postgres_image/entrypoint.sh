set -eu
data=/var/lib/postgresql/data/server
as_postgres="setpriv --reuid 999 --regid 999 --clear-groups"
if [ ! -d "$data" ]; then
    chown 999:999 "${data%/*}"
    printf %s "$POSTGRES_PASSWORD" > /tmp/password && chmod 644 /tmp/password
    $as_postgres initdb -D "$data" -U "$POSTGRES_USER" --auth=scram-sha-256 --pwfile=/tmp/password
    echo "CREATE DATABASE $POSTGRES_DB" | $as_postgres postgres --single -D "$data" postgres
    echo "host all all all scram-sha-256" >> "$data/pg_hba.conf"
fi
exec $as_postgres postgres -D "$data" -c 'listen_addresses=*' -c unix_socket_directories=/tmp
